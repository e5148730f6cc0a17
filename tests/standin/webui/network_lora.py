"""The change that a low-rank pair makes to one layer."""


class NetworkModuleLora:
    def __init__(self, network, key, weights):
        self.network, self.key = network, key
        self.up, self.down = (weights[f"lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
        self.scale = float(weights["alpha"]) / len(self.down) if "alpha" in weights else 1.0

    def multiplier(self):
        return self.network.te_multiplier if "transformer" in self.key[:20] else self.network.unet_multiplier

    def calc_updown(self, weight):
        updown = (self.up @ self.down).reshape(weight.shape)
        return updown * self.scale * self.multiplier(), None

    def forward(self, x, y):
        return y + (x @ self.down.T) @ self.up.T * self.scale * self.multiplier()
