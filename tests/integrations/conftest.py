"""What is about another library is left out where that is not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformers") else ["test_transformers_*.py", "tiny_models.py"]
