"""From splits to results.json on the digits: one pass, cached by what decides it, controls beside every figure."""

import io
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from evaluation_clouds import clouds, material
from sklearn.decomposition import PCA

from mae import config as configuration
from mae.config import configs_folder
from mae.data.sources import Splits, open_splits
from mae.errors import ConfigError
from mae.evaluation import controls, results
from mae.evaluation import features as features_module
from mae.evaluation.features import Share, encoder_hash, extract, gather
from mae.evaluation.material import Result
from mae.methods.mae import MAE
from mae.nets import vit

ON_FEATURES = ["knn", "knn_cifar10_anchor", "linear_probe_quick", "linear_probe_cifar10_anchor", "few_shot"]
ON_FEATURES += ["few_shot_1percent", "few_shot_10percent", "spectrum", "cka", "layer_probe", "attentive_probe"]
ON_MODELS = ["anomaly_one_class", "anomaly_folders", "dimension_reduction"]
CPU = torch.device("cpu")


class Counting:
    """A source that counts how often it is read, and shows only its first images so that tests are quick."""

    def __init__(self, source, length=None, labelled=True):
        self.source, self.length, self.labelled, self.reads = source, length or len(source), labelled, 0
        self.classes, self.fingerprint = source.classes, f"{source.fingerprint}/{length}"

    def __len__(self):
        return self.length

    @property
    def labels(self):
        return self.source.labels[: self.length] if self.labelled else None

    def read(self, index):
        self.reads += 1
        return self.source.read(index)

    def name_of(self, index):
        return self.source.name_of(index)


@pytest.fixture(scope="module")
def config():
    return configuration.load(["data.cache=none", "data.workers=0"])


@pytest.fixture
def splits(config):
    train, validation, test = open_splits(config.data)
    return Splits(Counting(train, 300), Counting(validation, 60), Counting(test, 100))


def build(seed=0):
    torch.manual_seed(seed)
    overrides = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return MAE(vit.create_encoder("vit_tiny_patch16_224", image_size=(8, 8), channels=1, overrides=overrides))


def protocols():
    quick = configuration.protocol("linear_probe_quick") | {"epochs": 3, "learning_rates": [0.01]}
    return [configuration.protocol("knn"), quick, configuration.protocol("few_shot") | {"draws": 2}]


def measure(model, config, splits, folder, **changes):
    arguments = dict(run_dir=folder / "run", device="cpu", controls=True, untrained=build)
    return results.run_protocols(model, config, splits, protocols(), **arguments | changes)


def reads(splits):
    return sum(source.reads for source in splits if source is not None)


def test_each_image_is_read_once_for_all_protocols_and_never_again_when_cached(config, splits, tmp_path):
    model = build(seed=1)
    alone = measure(model, config, splits, tmp_path, controls=False)
    assert reads(splits) == 460
    first = measure(model, config, splits, tmp_path)
    assert reads(splits) == 3 * 460  # the pixels for two controls, and the untrained encoder
    again = measure(model, config, splits, tmp_path)
    assert reads(splits) == 3 * 460
    ours = [e for e in first if e["encoder"]["name"] == "run"]
    for before, after in ((alone, ours), (first, again)):
        assert [{k: v for k, v in e.items() if k != "seconds"} for e in before] == [
            {k: v for k, v in e.items() if k != "seconds"} for e in after
        ]
    assert [e for e in first if e not in ours] == [e for e in again if e["encoder"]["name"] != "run"]  # their seconds too: not computed
    assert {e["encoder"]["name"] for e in first} == {"run", "control:pixels", "control:pca", "control:untrained"}
    assert len(first) == 12

    with torch.no_grad():
        model.encoder.norm.weight[0] += 1
    changed = measure(model, config, splits, tmp_path)
    assert reads(splits) == 4 * 460
    assert changed[0]["encoder"]["hash"] != first[0]["encoder"]["hash"]


def test_the_untrained_control_of_an_untrained_encoder_is_itself(config, splits, tmp_path):
    entries = measure(build(), config, splits, tmp_path)
    for protocol in ("knn", "linear_probe/quick", "few_shot"):
        ours, *_, untrained = (e for e in entries if e["protocol"] == protocol)
        assert untrained["encoder"]["name"] == "control:untrained"
        assert untrained["metrics"] == ours["metrics"]


def test_what_the_data_cannot_serve_is_skipped_with_the_reason(config, splits, tmp_path):
    said = []
    bare = Splits(splits.train, splits.validation, Counting(splits.test, labelled=False))
    assert measure(build(), config, bare, tmp_path, say=said.append) == []
    assert said[0] == "knn is skipped: the images have no labels"
    assert measure(build(), config, splits._replace(test=None), tmp_path, say=said.append) == []
    assert said[-1] == "few_shot is skipped: the data has no test split"
    assert reads(splits) == 0
    few = splits._replace(train=Counting(splits.train, 20), validation=Counting(splits.validation, 1))
    assert {e["protocol"] for e in measure(build(), config, few, tmp_path, say=said.append)} == {"knn", "linear_probe/quick"}
    assert "lower protocol.shots" in said[-1]


def test_an_entry_replaces_the_older_one_alike(config, splits, tmp_path):
    entries, file = measure(build(), config, splits, tmp_path), tmp_path / "run" / "results.json"
    results.add_entries(file, entries)
    results.add_entries(file, [entries[0] | {"metrics": {"accuracy": 1.0}}, entries[1] | {"seed": 7}])
    kept = json.loads(file.read_text())
    assert len(kept) == len(entries) + 1
    assert kept[0]["metrics"] == {"accuracy": 1.0}
    facts = {"protocol", "protocol_hash", "data", "split", "seed", "metrics", "encoder", "settings", "code", "seconds", "correct"}
    assert set(kept[0]) == facts
    assert sorted(p.name for p in file.parent.iterdir()) == ["predictions", "results.json"]


def test_protocols_that_look_into_the_encoder_share_the_one_pass_and_say_what_they_say_alone(config, splits, tmp_path):
    quick = {"epochs": 2, "learning_rates": [0.01]}
    within = [configuration.protocol(name) | quick for name in ("attentive_probe", "layer_probe")]
    wanted = [configuration.protocol("cka"), *within, configuration.protocol("knn")]
    arguments = dict(device="cpu", controls=False, untrained=build)
    together = results.run_protocols(build(), config, splits, wanted, run_dir=tmp_path / "together" / "run", **arguments)
    # CKA's raw pixels are no encoder's: the test images once more
    assert [split.reads for split in splits] == [300, 60, 200]
    alone = [
        e for p in wanted for e in results.run_protocols(build(), config, splits, [p], run_dir=tmp_path / "alone" / "run", **arguments)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], abs=0.01)


def test_which_test_images_were_right_is_kept_beside_every_entry(config, splits, tmp_path):
    for entry in measure(build(), config, splits, tmp_path) + measure(build(), config, splits, tmp_path):
        with np.load(tmp_path / "run" / entry["correct"]) as right:
            for name, share in right.items():
                assert share.shape == (100,)
                assert 100 * share.mean() == pytest.approx(entry["metrics"][name], abs=1e-4)
            assert set(right) == {k for k in entry["metrics"] if k.startswith("accuracy") and not k.endswith(("_ci95", "_std"))}


def test_a_protocol_that_trains_on_images_is_told_by_how_it_trains(splits, tmp_path):
    words = ["configs/evaluation/finetune_paper.yaml", "train.seed=3"]
    entries, result = [], Result({"accuracy": 90.0}, {})
    for word in ("train.seed=4", "data.workers=1", "optim.base_lr=0.5", "train.epochs=7", "protocol.drop_path=0.3"):
        entry = results.trained_entry(configuration.load([*words, word]), splits, result, encoder="run", seconds=1.0, run_dir=tmp_path)
        entries.append(entry)
    assert len({entry["protocol_hash"] for entry in entries}) == 4  # neither the seed nor the workers are part of it
    assert [entry["seed"] for entry in entries] == [4, 3, 3, 3, 3]
    assert all(entry["protocol"] == "finetune/paper" and entry["encoder"]["name"] == "run" for entry in entries)


@pytest.mark.parametrize("kept", [True, False])
def test_processes_that_share_the_images_out_read_each_once_and_all_get_the_same_features(config, splits, tmp_path, kept):
    alone = extract(build(), splits.test, config, device="cpu")
    before, meeting, parts, models = splits.test.reads, threading.Barrier(3), [None] * 3, [build() for _ in range(3)]

    def process(rank):
        """A thread in a process's place."""

        def join(rows):
            parts[rank] = rows
            meeting.wait()
            whole = torch.cat(parts)
            meeting.wait()
            return whole

        share = Share(rank, 3, join)
        given = {"device": "cpu", "cache": tmp_path if kept else None, "share": share}
        extract(models[rank], splits.test, config, **given)
        meeting.wait()
        return extract(models[rank], splits.test, config, **given)

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(process, range(3)))
    assert splits.test.reads - before == (100 if kept else 200)
    for features in together:
        for pool_name, found in alone.items():
            assert torch.equal(features[pool_name].y, found.y)
            torch.testing.assert_close(features[pool_name].x, found.x, rtol=1e-5, atol=1e-6)


def test_a_changed_setting_changes_the_protocol_hash(config, splits, tmp_path):
    knn = configuration.protocol("knn")
    arguments = dict(run_dir=tmp_path / "run", device="cpu", controls=False, untrained=build)
    hashes = [results.run_protocols(build(), config, splits, [knn | {"k": k}], **arguments)[0]["protocol_hash"] for k in (20, 20, 10)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_long_pass_shows_a_terminal_how_much_is_left_and_a_file_nothing(config, splits, monkeypatch):
    monkeypatch.setattr(features_module, "PATIENCE_SECONDS", 0)
    shown = []
    for is_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda answer=is_terminal: answer, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        extract(build(), splits.test, config, device="cpu")
        shown.append(stream.getvalue())
    assert re.search(r"encoding: .*\| \d/1 \[\d\d:\d\d<", shown[0])
    assert shown[1] == ""


def test_features_are_those_of_encode_and_the_model_stays_as_it_was(config, splits):
    model = build()
    model.train()
    model.encoder.norm.eval()
    source = splits.test
    features = extract(model, source, config, device="cpu")
    assert model.training
    assert not model.encoder.norm.training
    assert all(module.training for module in model.modules() if module is not model.encoder.norm)
    images = torch.from_numpy(np.stack([source.read(i) for i in range(100)])).permute(0, 3, 1, 2) / 255
    images = (images - config.data.mean[0]) / config.data.std[0]
    with torch.no_grad():
        for pool in ("mean", "cls"):
            torch.testing.assert_close(features[pool].x, model.eval().encode(images.float(), pool), rtol=1e-4, atol=1e-5)
    assert features["mean"].y.tolist() == source.labels.tolist()


def test_training_images_come_in_the_order_of_their_source(config):
    splits = open_splits(config.data)
    model = build()
    training, held_out = gather(lambda source: extract(model, source, config, device="cpu"), splits).training("mean")
    assert training.y.tolist() == splits.train.source.labels.tolist()
    assert held_out.nonzero().flatten().tolist() == splits.validation.positions.tolist()


def test_the_hash_of_an_encoder_sees_what_its_weights_do_not_show():
    two, four = (
        vit.create_encoder("vit_tiny_patch16_224", image_size=(8, 8), overrides=dict(patch_size=4, embed_dim=16, depth=1, num_heads=n))
        for n in (2, 4)
    )
    four.load_state_dict(two.state_dict())
    assert encoder_hash(MAE(two)) != encoder_hash(MAE(four))
    assert encoder_hash(MAE(two)) == encoder_hash(MAE(two, mask_ratio=0.5))


def test_the_pca_control_is_scikit_learns():
    data = material(clouds(200, width=12), clouds(50, width=12, seed=1))
    projected = controls.project(data, *controls.principal(data.train["mean"].x, 5))
    oracle = PCA(5).fit(data.train["mean"].x.double())
    ours = projected.test["mean"].x.double()
    theirs = torch.from_numpy(oracle.transform(data.test["mean"].x.double()))
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ON_FEATURES + ON_MODELS)
def test_the_yaml_lists_every_argument_with_its_help(name):
    protocol = configuration.protocol(name)
    module = results.evaluator(protocol)
    arguments = set(module.evaluate.__kwdefaults__ or {}) | set(module.evaluate.__annotations__) - {"material", "subject", "return"}
    assert set(protocol) - {"name"} <= arguments
    assert set(configuration.docs("protocol", protocol["name"])) == set(protocol) - {"name"}
    assert (configs_folder() / "evaluation" / f"{protocol['name'].replace('/', '_')}.yaml").exists() or name == "linear_probe_quick"


def test_a_protocol_that_is_not_for_features_is_refused():
    for protocol in ({"name": "nonsense"}, {"name": "knn", "mixup": 0.8}, {"name": "results"}):
        with pytest.raises(ConfigError, match="is not measured on features"):
            results.evaluator(protocol)
