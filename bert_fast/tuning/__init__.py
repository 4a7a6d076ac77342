"""What serves on this very machine: candidates are compiled, checked, timed, and the best is kept and written down.

candidates.py has what can be tried, trials.py how one is checked and timed, in a process of its own; rule.py decides,
store.py keeps. docs/design/gpu.md says who may choose what.
"""
