from modules.ui_components import ToolButton


def create_refresh_button(components, refresh, arguments, elem_id):
    button = ToolButton("🔄", elem_id=elem_id, tooltip="refresh")
    button.click(lambda: (refresh(), arguments())[1], [], components)
    return button
