"""PCA in one pass equals scikit-learn's; the linear autoencoder finds the same subspace; large images come out nearly so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import decomposition

import mae
from mae import config
from mae.data.sources import open_splits
from mae.errors import ConfigError
from mae.methods import pca
from mae.methods.ae import AE
from mae.nets.conv import DenseEncoder


def digits():
    splits = open_splits(config.load([]).data)
    return torch.stack([torch.from_numpy(splits.train.read(i)).permute(2, 0, 1) for i in range(len(splits.train))]) / 255.0


def fitted(images, components, batch):
    method = mae.create(["configs/methods/pca.yaml", f"method.components={components}"])
    method.fit((part, None) for part in images.split(batch))
    return method


@settings(max_examples=8, deadline=None)
@given(components=st.integers(1, 64), batch=st.integers(1, 1200), offset=st.sampled_from([0.0, 1000.0]))
def test_one_pass_equals_scikit_learn(components, batch, offset):
    images = digits() + offset  # a large mean must cost no precision
    method = fitted(images, components, batch)
    oracle = decomposition.PCA(components, svd_solver="full").fit(images.flatten(1).double().numpy())
    expected = torch.from_numpy(oracle.inverse_transform(oracle.transform(images.flatten(1).double().numpy()))).float()
    torch.testing.assert_close(method.reconstruct(images).flatten(1), expected, atol=1e-4 if offset == 0 else 2e-2, rtol=0)
    torch.testing.assert_close(method.variances, torch.from_numpy(oracle.explained_variance_).float(), atol=1e-4, rtol=1e-3)


def test_large_images_are_decomposed_in_one_pass_too():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(600, 20)).Q
    rows = torch.randn(500, 20) @ torch.diag(torch.linspace(10, 1, 20)) @ basis.T + 0.01 * torch.randn(500, 600) + 3
    count, mean, directions, variances = pca._incremental((part.double() for part in rows.split(64)), 24)
    oracle = decomposition.PCA(10, svd_solver="full").fit(rows.double().numpy())
    assert count == 500
    torch.testing.assert_close(mean, rows.double().mean(0))
    overlap = torch.linalg.svdvals(directions[:10] @ torch.from_numpy(oracle.components_).T)
    assert overlap.min() > 0.9999
    torch.testing.assert_close(variances[:10], torch.from_numpy(oracle.explained_variance_), rtol=1e-3, atol=1e-3)


def test_the_linear_autoencoder_finds_the_principal_subspace():
    torch.manual_seed(0)
    images, k = digits(), 4
    images = (images - images.mean(0))[:, :, ::2, ::2].contiguous()  # 16 values
    encoder = DenseEncoder((4, 4), 1, embed_dim=k, sigmoid=False)
    method = AE(encoder, bottleneck="global", bottleneck_size=k)
    optimizer = torch.optim.LBFGS(method.parameters(), max_iter=400, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = method(images, keys=torch.arange(len(images))).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        decoded = method.decode(torch.cat([torch.zeros(1, k), torch.eye(k)])).flatten(1)
    directions = torch.linalg.qr((decoded[1:] - decoded[0]).T).Q  # (16, k): what the decoder can span
    oracle = torch.from_numpy(decomposition.PCA(k).fit(images.flatten(1).numpy()).components_)
    cosines = torch.linalg.svdvals(directions.T @ oracle.T)  # of the principal angles
    assert cosines.min() > 0.999


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="needs more training images"):
        fitted(digits()[:10], 32, 10)


def test_components_without_variance_are_told():
    method = mae.create(["configs/methods/pca.yaml", "method.components=4"])
    method.variances.copy_(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    assert method.diagnose([]).alarms == ["only 2 of 4 components vary: lower method.components"]
    method.variances.fill_(1.0)
    assert method.diagnose([]).alarms == []
