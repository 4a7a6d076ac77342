"""Which room may import which: arrows go down, and there are no circles.

Imports within functions count as those at the top of a file do.
"""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The ground floor, which every room may import.
GROUND = {
    "choice", "compilers", "devices", "dropout_mask", "extras", "flops", "graph_memory", "interpreter", "output",
    "pictures", "products", "supervised", "text",
}  # fmt: skip

# From bottom to top: a room, and those below it that it may import, with the rooms within them.
ROOMS = {
    "reference": "",
    "optim.reference": "",  # a specification, as reference is
    "kernels": "reference optim.reference",
    "peers": "reference",
    "dispatch": "kernels peers reference optim.reference",
    "linear": "",
    "packing": "",
    "ops": "dispatch reference linear packing",
    "optim": "dispatch optim.reference",
    "tuning.store": "",
    "tuning": "tuning.store ops dispatch reference kernels",
    "model": "ops linear packing reference tuning.store",
    "bert_fast": "model dispatch",  # what `import bert_fast` gives
    "env": "bert_fast dispatch kernels",
    "data": "",
    "train": "model linear ops optim",
    "train.evaluation": "model data",
    "train.schedule": "data",
    "run": "train bert_fast model optim data tuning",
    "use": "run model data",
    "tasks": "use run train model data optim",
    "cli": "tasks use run train bert_fast env data",
    "__main__": "cli",
    "benchmarks": "tuning tasks use run train bert_fast env data model optim ops linear packing dispatch kernels "
    "reference",
}

AOT, EXPERIMENTS = "bert_fast.kernels.aot", "bert_fast.kernels.experiments."

# Where each experiment is reached from: the default's file, where a table names the GPU, or the table of operators.
SEAMS = {"attention_hopper": {"bert_fast.kernels.attention"}, "feed_forward": {"bert_fast.dispatch"}}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"bert_fast.{name}" if name.startswith("kernels") else name


MODULES = {
    module_of(path): path
    for folder in ("bert_fast", "kernels", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if ROOT / "bert_fast" / "kernels" not in path.parents  # a link to kernels/
}


def imported(source: str) -> set[str]:
    """The modules of this project that a file imports, wherever in it, and those that import_module is told by name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return {first_of(name, MODULES) for name in names} - {None}


def first_of(name: str, known) -> str | None:
    """The first of a.b.c, a.b and a that is ``known``."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str) -> str | None:
    return first_of(module.removeprefix("bert_fast."), {*ROOMS, *GROUND})


def may_import(room: str, other: str) -> bool:
    return room == other or other in GROUND or first_of(other, ROOMS.get(room, "").split()) is not None


@functools.cache
def arrows() -> dict[str, set[str]]:
    return {module: imported(path.read_text(encoding="utf-8")) - {module} for module, path in MODULES.items()}


def test_every_module_is_in_a_room():
    assert [module for module in MODULES if room_of(module) is None] == []


def test_the_table_is_from_bottom_to_top():
    rooms = list(ROOMS)
    for number, (room, below) in enumerate(ROOMS.items()):
        assert {*below.split()} <= {*rooms[:number]}, room


def test_arrows_go_down():
    wrong = [
        f"{module} -> {other}"
        for module, others in arrows().items()
        for other in others
        if not may_import(room_of(module), room_of(other))
    ]
    assert wrong == []


def test_no_circles():
    graphlib.TopologicalSorter(arrows()).prepare()  # CycleError names the circle


def test_experiments_are_reached_by_their_seam_alone():
    """By an import, or by a name in a string that something imports. kernels/aot.py is for the compile report alone."""
    reached = {path.stem: set() for path in (ROOT / "kernels" / "experiments").glob("*.py")}
    for module, others in arrows().items():
        assert AOT not in others
        if room_of(module) == "benchmarks" or module == AOT or module.startswith(EXPERIMENTS):
            continue
        constants = (node.value for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
                     if isinstance(node, ast.Constant))  # fmt: skip
        for name in {*others, *(f"bert_fast.kernels.{value}" for value in constants)}:
            if name.startswith(EXPERIMENTS):
                reached[name.removeprefix(EXPERIMENTS)].add(module)
    assert reached == SEAMS


@pytest.mark.parametrize(
    "source",
    [
        "import bert_fast.data.pairs",
        "from bert_fast.data import pairs",
        "from bert_fast.data.pairs import Corpus",
        "def late():\n    from bert_fast.data.pairs import Corpus",
        "import importlib\nimportlib.import_module('bert_fast.data.pairs')",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert imported(source) == {"bert_fast.data.pairs"}
    assert not may_import("model", room_of("bert_fast.data.pairs"))
    assert may_import("run", room_of("bert_fast.data.pairs"))
