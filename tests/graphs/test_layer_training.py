"""Checkpoints of finished layers, and training shared by several processes."""

import os

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import distributed as dist
from torch_geometric.data import Data
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNClassifier
from sciml.graphs.layer_training import SharedBatches


def digits_graph(n=200):
    x, y = load_digits(return_X_y=True)
    edges = to_undirected(from_scipy_sparse_matrix(kneighbors_graph(x[:n], 5))[0])
    x = torch.as_tensor(x[:n] / 16, dtype=torch.float32)
    part = torch.arange(n) % 3
    return Data(
        x=x, edge_index=edges, y=torch.as_tensor(y[:n]), train_mask=part == 0, val_mask=part == 1
    )


def model(**kwargs):
    settings = {"hidden_channels": 8, "num_layers": 3, "max_epochs": 8, "random_state": 0} | kwargs
    return ForwardGNNClassifier(**settings)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [{"method": "sf"}, {"method": "ff_virtual"}, {"model_kwargs": {"dropout": 0.5}}],
    ids=["sf", "ff_virtual", "dropout"],
)
def test_interrupted_training_resumes_to_the_same_network(tmp_path, options, monkeypatch):
    data = digits_graph()
    whole = model(**options).fit(data)
    from sciml.graphs import layer_training

    save, saved = layer_training.save_checkpoint, []

    def save_two(path, *args):
        if len(saved) == 2:
            raise Interrupted
        saved.append(path.name)
        save(path, *args)

    monkeypatch.setattr(layer_training, "save_checkpoint", save_two)
    with pytest.raises(Interrupted):
        model(**options, checkpoint_dir=tmp_path).fit(data)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["layer_1.safetensors", "layer_2.safetensors"]
    stamps = [(tmp_path / name).stat().st_mtime_ns for name in saved]
    resumed = model(**options, resume_from=tmp_path).fit(data)
    np.testing.assert_array_equal(resumed.predict_proba(), whole.predict_proba())
    assert resumed.history_ == whole.history_
    assert stamps == [(tmp_path / name).stat().st_mtime_ns for name in saved]


def test_layers_of_another_training_are_refused(tmp_path):
    data = digits_graph()
    model(checkpoint_dir=tmp_path).fit(data)
    with pytest.raises(ValueError, match="lr \\(0.001 then, 0.01 now\\)"):
        model(resume_from=tmp_path, lr=0.01).fit(data)
    with pytest.raises(ValueError, match="seed"):
        model(resume_from=tmp_path, random_state=1).fit(data)
    with pytest.raises(ValueError, match="stage .*64, 8.* then, .*64, 9.* now"):
        model(resume_from=tmp_path, hidden_channels=9).fit(data)
    with pytest.raises(ValueError, match="batch_size \\(None then, 5 now\\)"):
        model(resume_from=tmp_path, batch_size=5).fit(data)


def test_shares_of_a_batch_are_disjoint_and_complete(monkeypatch):
    from sciml.graphs import layer_training

    epochs = []
    for rank in range(3):
        monkeypatch.setattr(layer_training, "process_rank", lambda rank=rank: (rank, 3))
        epochs.append(list(SharedBatches(n_samples=10, batch_size=4, seed=0)))
    monkeypatch.setattr(layer_training, "process_rank", lambda: (0, 1))
    alone = list(SharedBatches(n_samples=10, batch_size=4, seed=0))
    assert sorted(torch.cat([batch for batch, _ in alone]).tolist()) == list(range(10))
    for step, (batch, weight) in enumerate(alone):
        assert weight == 1
        shares = [epoch[step] for epoch in epochs]
        assert sum(w for _, w in shares) == pytest.approx(1)
        together = torch.cat([share for share, w in shares if w])
        assert sorted(together.tolist()) == sorted(batch.tolist())


def _train_on_one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    est = model(batch_size=25, grad_clip=0.05, num_layers=2, checkpoint_dir=f"{folder}/layers")
    est.fit(digits_graph())
    np.savez(
        f"{folder}/rank{rank}.npz",
        proba=est.predict_proba(),
        loss=[entry["loss"] for history in est.history_ for entry in history],
    )
    dist.destroy_process_group()


def test_two_processes_train_what_one_would(tmp_path):
    torch.multiprocessing.spawn(_train_on_one_of_two, (str(tmp_path),), nprocs=2)
    alone = model(batch_size=25, grad_clip=0.05, num_layers=2).fit(digits_graph())
    loss = [entry["loss"] for history in alone.history_ for entry in history]
    for rank in range(2):
        got = np.load(tmp_path / f"rank{rank}.npz")
        np.testing.assert_allclose(got["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(got["proba"], alone.predict_proba(), atol=1e-4)
    assert len(os.listdir(tmp_path / "layers")) == 2
