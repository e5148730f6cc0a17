"""Research needs diffusers, which the WebUIs' own library versions leave out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("diffusers") else ["test_*.py"]
