"""Images as files."""

from itertools import count
from pathlib import Path

from PIL.PngImagePlugin import PngInfo


def save_image(image, folder, seed, info):
    """Save under the next free number of the folder, and note the place on the image."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    place = next(
        place for number in count() if not (place := Path(folder) / f"{number:05}-{seed}.png").exists()
    )
    text = PngInfo()
    text.add_text("parameters", info)
    image.save(place, pnginfo=text)
    image.already_saved_as = str(place)
