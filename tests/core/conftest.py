"""Files of trainers' own libraries need these, which the WebUIs' own library versions leave out."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("peft") else ["test_trainer_libraries.py", "test_trainer_scores.py"]
