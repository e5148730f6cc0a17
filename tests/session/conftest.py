"""The stand-alone run needs diffusers, which the WebUIs' own library versions leave out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("diffusers") else ["test_diffusers_*.py"]
