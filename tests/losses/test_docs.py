"""docs/losses.md says what the code does."""

import re
from pathlib import Path

from tests.losses.batches import make_batch
from tests.losses.test_surrogates import run
from vespo_megatron.losses import get_objective, objective_names
from vespo_megatron.losses.advantages import ESTIMATORS
from vespo_megatron.losses.correction import CORRECTIONS

TEXT = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()


def test_every_objective_is_documented_with_its_defaults_and_source():
    rows = {m.group(1): m.group(0) for m in re.finditer(r"^\| `(\w+)` \|.*$", TEXT, re.MULTILINE)}
    for name in objective_names():
        objective = get_objective(name)
        for key, value in objective.hyperparameters.items():
            assert f"{key} {value}" in rows[name]
        assert objective.source in rows[name] and objective.aggregation in rows[name]
    assert all(f"`{name}`" in TEXT for name in [*ESTIMATORS, *CORRECTIONS])


def test_every_metric_is_documented():
    documented = set()
    for line in TEXT.splitlines():
        names = re.findall(r"`([a-z_0-9/]+)`", line.split("|")[1]) if line.startswith("| `") else []
        for name in names:
            if "/" in name:
                base = name
                documented.add(name)
            elif names[0].count("/"):
                area = names[0].split("/")[0]
                documented.add(f"{area}/{name}")
                for cut in range(len(base)):  # "_max" after "vespo/w_mean" is vespo/w_max
                    if base[cut] == "_":
                        documented.add(base[:cut] + name)
    for name in ("vespo", "grpo"):
        found = run(make_batch(4), name)[0].metrics.finalize()
        assert not set(found) - documented
