"""The ladder runs every method to one budget and writes one table; unlike figures are never put side by side."""

import json

import pytest

from mae import config
from mae.commands import ladder
from mae.errors import ConfigError
from mae.reporting import comparison
from mae.training.run import RunFolder

TINY = ["encoder.embed_dim=32", "encoder.depth=1", "train.steps=3", "train.batch_size=32", "evaluate.protocols=[knn]", "track.wandb=off"]


def test_the_quick_ladder_compares_every_method_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["configs/data/digits.yaml", "--quick", "evaluate.controls=false", *TINY]
    assert ladder.main(words) == 0
    folder = tmp_path / "runs" / "ladder-digits-quick"
    table = (folder / "comparison-flops.md").read_text()
    for name in (p.stem for p in (config.configs_folder() / "methods").glob("*.yaml")):
        assert f"| {name}" in table
    assert "| mae (on the plateau, not ranked) |" in table  # three steps teach nothing
    images = {row.split("|")[1].split()[0]: row.split("|")[-3].strip() for row in table.splitlines()[4:]}
    assert images["mae"] == "96"
    assert int(images["ae"]) < 96  # a full-token encoder is dearer, so that it sees fewer images
    assert images["pca"] == "-"
    capsys.readouterr()
    assert ladder.main(words) == 0
    assert "===" not in capsys.readouterr().out  # nothing was trained again
    assert (folder / "comparison-flops.md").read_text() == table


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "on which data"),
        (["configs/data/digits.yaml", "method.mask_ratio=0.5"], "sets method"),
        (["configs/data/digits.yaml", "train.minutes=1"], "not minutes"),
    ],
)
def test_what_the_ladder_cannot_do_is_said(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ladder.main(words) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def entry(name, accuracy, protocol_hash="a", data="digits@1"):
    metrics = {"accuracy": accuracy, "n_test": 10}
    return dict(protocol="knn", protocol_hash=protocol_hash, data=data, split="test", metrics=metrics, encoder={"name": name, "hash": name})


def test_figures_that_were_not_obtained_alike_are_refused():
    rows = [comparison.Row("a", [entry("a", 1.0)], {}), comparison.Row("b", [entry("b", 2.0, protocol_hash="b")], {})]
    with pytest.raises(ConfigError, match="other settings"):
        comparison.markdown(rows, caption="")
    rows[1] = comparison.Row("b", [entry("b", 2.0, data="digits@2")], {})
    with pytest.raises(ConfigError, match="other data"):
        comparison.markdown(rows, caption="")


def test_a_row_is_a_mean_with_its_spread_and_the_better_one_stands_first():
    rows = [
        comparison.Row("low", [entry("x", 10.0), entry("y", 20.0)], {}),
        comparison.Row("stuck", [entry("z", 99.0)], {}, not_ranked="on the plateau"),
        comparison.Row("high", [entry("w", 30.0)], {}),
    ]
    lines = comparison.markdown(rows, caption="c").splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:7]] == ["high", "low", "stuck (on the plateau, not ranked)"]
    assert "15.0 ± 7.1" in lines[5]


def test_what_failed_and_how_many_seeds_did_not_is_said(tmp_path):
    runs = {name: [RunFolder(tmp_path / f"{name}-s{seed}") for seed in range(3)] for name in ("mae", "vae", "ae")}
    failed = [runs["mae"][1], *runs["vae"]]
    for run in (run for some in runs.values() for run in some):
        run.path.mkdir()
        run.status("failed" if run in failed else "done")
        run.results.write_text(json.dumps([entry("mae", 50.0)]))
    ladder._write(tmp_path / "table.md", "flops", runs, dict.fromkeys(runs, 3), dict.fromkeys(runs, 1e6), config.load([]))
    text = (tmp_path / "table.md").read_text()
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[1:] == ["mae (2 of 3 seeds)", "ae", "vae (failed, not ranked)"]
    assert "what the optimizer does is not counted" in text
