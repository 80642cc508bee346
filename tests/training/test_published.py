from __future__ import annotations

import itertools
import os

import pytest
import torch
from safetensors.torch import save_file

from gfnode_fast import reference
from gfnode_fast.training import CheckpointError, DataConfig, check_checkpoint
from gfnode_fast.training.published import infer_arguments, read_state_dict

SIZES = {
    "n_layers": 2,
    "in_node_nf": 2,
    "in_edge_nf": 5,
    "hidden_nf": 8,
    "num_modes": 2,
    "time_emb_dim": 6,
    "fourier_basis": "graph",
}
SMALL = {"delta_frame": 20, "num_timesteps": 3}


def model(**options):
    torch.manual_seed(0)
    return reference.FourierMD(**{**SIZES, "with_v": True, "delta_frame": 20, **options})


@pytest.mark.parametrize(
    ("kind", "interaction", "mode", "flat"),
    [
        *itertools.product(
            ("egnn", "sage", "gcn"),
            ("no_interaction", "attention", "concat"),
            ("none", "mlp", "rope"),
            (False,),
        ),
        ("egnn", "no_interaction", "none", True),
        ("sage", "no_interaction", "none", True),
    ],
)
def test_sizes_are_read_off_the_weights(kind, interaction, mode, flat):
    options = {
        "gnn_ablation_mode": kind,
        "mode_interaction": interaction,
        "time_mode": mode,
        "flat": flat,
    }
    state = model(**options).state_dict()
    found = infer_arguments(state, time_mode="rope" if mode == "rope" else None)
    assert found == {**SIZES, **options, "use_vae": False}
    reference.FourierMD(**found, with_v=True, delta_frame=20).load_state_dict(state)


@pytest.mark.parametrize("options", [{"use_vae": True}, {"fourier_basis": "linear"}])
def test_other_parts_are_recognised(options):
    state = model(**options).state_dict()
    found = infer_arguments(state)
    assert found.items() >= options.items()
    reference.FourierMD(**found, with_v=True, delta_frame=20).load_state_dict(state)


def test_an_ambiguous_time_mode_has_to_be_named():
    state = model(time_mode="posenc").state_dict()
    with pytest.raises(ValueError, match="`time_mode` must be given, one of concat, posenc, rope"):
        infer_arguments(state)
    with pytest.raises(ValueError, match="`time_mode` must be none"):
        infer_arguments(model().state_dict(), time_mode="rope")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}},
    ],
)
def test_files_of_torch(tmp_path, wrap):
    state = model().state_dict()
    torch.save(wrap(state), tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_safetensors_and_our_own(tmp_path, finished_run):
    state = model().state_dict()
    save_file(state, tmp_path / "x.safetensors")
    assert read_state_dict(tmp_path / "x.safetensors").keys() == state.keys()
    assert "embedding.weight" in read_state_dict(finished_run)
    assert "embedding.weight" in read_state_dict(finished_run / "last.json")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("broken-into",)


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "x.pt")
    with pytest.raises(CheckpointError, match="must hold weights alone"):
        read_state_dict("x.pt")
    torch.save(model(), "whole.pt")
    with pytest.raises(CheckpointError, match=r"save model.state_dict\(\)"):
        read_state_dict("whole.pt")
    assert not (tmp_path / "broken-into").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", b"not a checkpoint", "must"),
        ("x.pt", b"", "must be what torch.save wrote"),
        ("x.safetensors", b"\x00" * 4, "must be a safetensors file"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / name)


def test_truncated_files_are_named(tmp_path):
    torch.save(model().state_dict(), tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    for length in (100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"what torch.save wrote, got .*cut\.pt"):
            read_state_dict(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("embedding.weight", torch.zeros(3), "a usable 'embedding.weight'"),
        ("freq_conv.t_conv.ode_func.weights1", torch.zeros(3), "a usable 'freq_conv"),
        ("embedding.bias", torch.zeros(3), "size mismatch for embedding.bias"),
        ("embedding.bias", torch.zeros(8, dtype=torch.int64), "torch.int64 .* in embedding.bias"),
        ("embedding.bias", torch.full((8,), torch.nan), "NaN or infinity in embedding.bias"),
        ("extra", torch.zeros(3), 'Unexpected key.* "extra"'),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, trajectory_file, name, tensor, message):
    torch.save(model().state_dict() | {name: tensor}, tmp_path / "x.pt")
    data = DataConfig(trajectory=str(trajectory_file), **SMALL)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(tmp_path / "x.pt", data=data)


@pytest.mark.parametrize("option", ["batch_size", "repeats"])
def test_nothing_to_run_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"`{option}` must be at least 1, got 0"):
        check_checkpoint(tmp_path / "x.pt", **{option: 0})


def test_other_content_is_refused(tmp_path):
    torch.save({"lr": 0.1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="must hold a state_dict"):
        read_state_dict(tmp_path / "x.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="of a FourierMD"):
        check_checkpoint(tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="existing file"):
        read_state_dict(tmp_path / "z.pt")


@pytest.mark.parametrize("options", [{}, {"use_vae": True}, {"time_mode": "mlp"}])
def test_both_models_agree(tmp_path, trajectory_file, options):
    torch.save(model(**options).state_dict(), tmp_path / "x.pt")
    data = DataConfig(trajectory=str(trajectory_file), **SMALL)
    before = torch.get_rng_state()
    found = check_checkpoint(tmp_path / "x.pt", data=data, batch_size=3, repeats=1, device="cpu")
    assert found.passed
    assert max(found.errors.values()) < 1e-4
    assert found.reference_ms > 0
    assert found.fast_ms > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert found.to_dict()["passed"] is True


def test_a_disagreement_is_seen(tmp_path, trajectory_file, monkeypatch):
    from gfnode_fast.training import agreement

    class Wrong(agreement.FourierMD):
        def forward(self, *args, **kwargs):
            x, v, h, kld = super().forward(*args, **kwargs)
            return 1.01 * x, v, h, kld

    monkeypatch.setattr(agreement, "FourierMD", Wrong)
    torch.save(model().state_dict(), tmp_path / "x.pt")
    data = DataConfig(trajectory=str(trajectory_file), **SMALL)
    found = check_checkpoint(tmp_path / "x.pt", data=data, batch_size=2, repeats=1, device="cpu")
    assert not found.passed


def test_other_features_are_refused(tmp_path):
    torch.save(model(in_node_nf=3).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="`in_node_nf` must be 2"):
        check_checkpoint(tmp_path / "x.pt")
