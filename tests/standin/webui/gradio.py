"""Components that hold a value, and no page."""

from types import SimpleNamespace


class Component:
    def __init__(self, value=None, **settings):
        self.value, self.settings, self.clicked = value, settings, None
        self.__dict__.update(settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def change(self, fn, inputs, outputs, **_):
        self.changed = SimpleNamespace(fn=fn, inputs=inputs, outputs=outputs)

    def click(self, fn, inputs, outputs, **_):
        self.clicked = SimpleNamespace(fn=fn, inputs=inputs, outputs=outputs)


class Dropdown(Component):
    pass


class Radio(Component):
    pass


class Button(Component):
    pass


class HTML(Component):
    pass


class Slider(Component):
    pass


class Textbox(Component):
    pass


class Checkbox(Component):
    pass


class Block(Component):
    def __init__(self, label=None, **settings):
        super().__init__(None, label=label, **settings)


Row = Accordion = Block
