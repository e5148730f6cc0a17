from gradio import Block, Component


class ToolButton(Component):
    pass


class InputAccordion(Component):
    def __init__(self, value, **settings):
        super().__init__(value, **settings)
        self.accordion = Block(settings["label"])
