"""A linear probe on every block: at which depth is the class most readable? After Alain & Bengio, arXiv:1610.01644.

Masked autoencoders are known to be most linearly readable before their last blocks, which already serve the decoder.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from mae.evaluation import layers, linear_probe
from mae.evaluation.canvas import blank, rendered
from mae.evaluation.features import LAYERS, layer_name
from mae.evaluation.material import Material, Result, accuracy_of, score
from mae.evaluation.subject import Subject

VERSION = 1
NEEDS_LABELS = True
OF_MODEL = True
READS = LAYERS


def evaluate(
    subject: Subject, *, learning_rates: list[float], weight_decays: list[float], epochs: int, batch_size: int, seed: int = 0
) -> Result:
    """`accuracy_layerN` (`..._cls`) on the test images of a linear probe after N blocks, for N = 1 ... depth, each with the learning rate
    and weight decay that are best on the validation images; `accuracy` (`accuracy_cls`) is that of the layer that is best there.

    All layers come from one pass over the images where they fit into memory; all settings of a layer are trained at once, as in
    linear_probe. The picture `depth` shows accuracy against depth. Raises ConfigError for an encoder without blocks.
    """
    grid = [(rate, decay) for rate in learning_rates for decay in weight_decays]
    best: dict[str, Any] = {}  # by the way of pooling: merit on validation, layer, which test images are right
    metrics: dict[str, float] = {}
    settings: dict[str, Any] = {}
    curves: dict[str, list[list[float]]] = {}  # by the way of pooling, a point a layer: accuracy, half-width
    for layer, pooling, material in _each(subject):
        learn = partial(linear_probe.train, epochs=epochs, batch_size=batch_size, classes=material.class_count, seed=seed)
        name = layer_name(layer, pooling)
        training, validation = linear_probe.split(material, name, seed)
        found = linear_probe.merits(learn(training.rows(~validation), grid), training.rows(validation))
        choice = linear_probe.best(found)
        test = material.testing(name)
        correct = linear_probe.predict(learn(training, [grid[choice]]), test.x)[:, 0] == test.y
        metrics |= score(correct, name)
        settings[f"learning_rate_{name}"], settings[f"weight_decay_{name}"] = grid[choice]
        settings[f"validation_accuracy_{name}"] = 100 * found[choice][1] / int(validation.sum())
        curves.setdefault(pooling, []).append([metrics[accuracy_of(name)], metrics[f"{accuracy_of(name)}_ci95"]])
        if pooling not in best or found[choice] > best[pooling][0]:
            best[pooling] = found[choice], layer, correct
    of_best: dict[str, float] = {}
    right: dict[str, np.ndarray] = {}
    for pooling, (_, layer, correct) in best.items():
        of_best |= score(correct, pooling)
        settings[f"layer_{pooling}"] = layer
        right[accuracy_of(pooling)] = correct.cpu().numpy()
    counts = {"n_test": len(test.y), "n_train": len(training.y)}
    return Result(of_best | metrics | counts, settings, {"depth": _picture(curves, settings)}, right)


def _each(subject: Subject) -> Iterator[tuple[int, str, Material]]:
    """Every layer and way of pooling, with the material that holds its features."""
    for some, material in layers.materials(subject):
        yield from ((layer, pooling, material) for layer in some for pooling in layers.pools_of(subject))


def _picture(curves: dict[str, list[list[float]]], settings: dict[str, Any]) -> np.ndarray:
    figure = blank(5.0, 3.6)
    axes = figure.add_subplot()
    for colour, (pooling, points) in enumerate(curves.items()):
        accuracy, half = np.array(points).T
        depth = np.arange(1, len(points) + 1)
        axes.errorbar(depth, accuracy, half, color=f"C{colour}", marker="o", markersize=4, linewidth=1, capsize=2, label=pooling)
        chosen = settings[f"layer_{pooling}"]
        axes.plot(chosen, accuracy[chosen - 1], "o", color=f"C{colour}", markersize=11, fillstyle="none")
    axes.set(xlabel="after so many blocks (ringed: chosen on validation)", ylabel="test accuracy, %", title="Linear probe by depth")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return rendered(figure)
