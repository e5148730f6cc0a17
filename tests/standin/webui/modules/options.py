"""The host's options and what its settings page shows of each."""


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None):
        self.default, self.label, self.component, self.component_args, self.onchange = (
            default,
            label,
            component,
            component_args,
            onchange,
        )
        self.section, self.comment_after, self.do_not_save = None, "", False

    def info(self, text):
        self.comment_after += text
        return self


def options_section(section, infos):
    for info in infos.values():
        info.section = section
    return infos


class Options:
    """Read as attributes; what extensions add has its label among `data_labels`."""

    def __init__(self, data):
        self.__dict__.update(data=dict(data), data_labels={})

    def __getattr__(self, name):
        if name in self.data:
            return self.data[name]
        if name in self.data_labels:
            return self.data_labels[name].default
        raise AttributeError(name)

    def __setattr__(self, name, value):
        self.data[name] = value

    def add_option(self, name, info):
        self.data_labels[name] = info
        if not info.do_not_save:
            self.data.setdefault(name, info.default)

    def set(self, name, value):
        info, changed = self.data_labels.get(name), self.data.get(name) != value
        if info is not None and info.do_not_save:
            return
        self.data[name] = value
        if changed and info is not None and info.onchange is not None:
            info.onchange()
