"""What a user's type checker sees of the package (``py.typed``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

USER = """
import bert_fast

config = bert_fast.BertConfig()
reveal_type(config)
reveal_type(bert_fast.BertForPreTraining(config))
reveal_type(bert_fast.BertModel.from_pretrained("folder"))
reveal_type(bert_fast.backends())
bert_fast.BertForPreTraining(config)(labels=None, masked_positions=None)
bert_fast.use_backend(3)
bert_fast.BertForPretraining
"""


@pytest.mark.slow  # mypy reads torch and transformers: a minute
def test_a_users_type_checker_sees_the_classes(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    options = ("--config-file=", "--cache-dir=cache", "--ignore-missing-imports", "--follow-imports=silent")
    environment = {**os.environ, "MYPYPATH": str(Path(__file__).parents[1])}
    command = (sys.executable, "-m", "mypy", *options, "user.py")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    seen = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if line.startswith("user.py:")}
    for line, kind in (
        (5, "configuration_bert.BertConfig"),
        (6, "bert_fast.model.heads.BertForPreTraining"),
        (7, "bert_fast.model.base.BertModel"),
        (8, "dict[str, "),
    ):
        assert "Revealed type" in seen[line], done.stdout + done.stderr
        assert kind in seen[line]
    assert set(seen) == {5, 6, 7, 8, 10, 11}, done.stdout
    assert "has incompatible type" in seen[10]
    assert "has no attribute" in seen[11]
