"""What the tests of the widgets share: what a viewer shows, in panels and words."""

import io

from PIL import Image


def drawn(viewer):
    """The bytes of each panel."""
    return {name: image.value for name, image in viewer._shell.images.items()}


def redrawn(viewer, act):
    """The panels whose bytes something changes."""
    before = drawn(viewer)
    act()
    return {name for name, value in drawn(viewer).items() if value != before[name]}


def size_of(value):
    """The width and height of an encoded picture."""
    return Image.open(io.BytesIO(value)).size


def size(viewer, name="image"):
    return size_of(viewer._shell.images[name].value)


def text(viewer, name):
    return viewer._shell.texts[name].value
