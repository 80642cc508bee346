from __future__ import annotations

import pytest

from gfnode_fast.training import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
)
from gfnode_fast.training.config import differences
from small_run import small_config


def test_defaults_are_the_published_recipe():
    config = TrainConfig()
    assert (config.optim.lr, config.optim.weight_decay) == (1e-4, 1e-15)
    assert (config.optim.batch_size, config.optim.epochs) == (50, 5000)
    assert (config.optim.lr_step_epochs, config.optim.lr_gamma) == (2500, 0.5)
    assert config.optim.validate_every == 5
    assert (config.model.n_layers, config.model.hidden_nf, config.model.time_emb_dim) == (5, 64, 32)
    assert (config.model.solver, config.model.rtol, config.model.atol) == ("dopri5", 1e-3, 1e-4)
    assert (config.data.num_timesteps, config.data.delta_frame) == (8, 3000)
    assert (config.data.train_size, config.data.val_size, config.data.test_size) == (
        500,
        2000,
        2000,
    )


def test_round_trip_through_plain_values(tmp_path):
    config = small_config(tmp_path / "x.npz", tmp_path, data={"rigid_bonds": [(0, 1)]})
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DataConfig(trajectory=""), "data.trajectory"),
        (lambda: DataConfig(trajectory="x.npz", dt_fs=-1.0), "data.dt_fs"),
        (lambda: DataConfig(trajectory="sample:aspirin", dt_fs=1.0), "data.dt_fs"),
        (lambda: DataConfig(trajectory="sample:aspirin", format="md17"), "data.format"),
        (lambda: DataConfig(trajectory="sample:aspirin", heavy_only=False), "data.heavy_only"),
        (lambda: DataConfig(delta_frame=4), "data.delta_frame"),
        (lambda: DataConfig(train_size=0), "data.train_size"),
        (lambda: DataConfig(num_timesteps=True), "data.num_timesteps"),
        (lambda: DataConfig(sampling="sometimes"), "data.sampling"),
        (lambda: DataConfig(fractions=(1.0, 0.0, 1.0)), "data.fractions"),
        (lambda: DataConfig(rigid_bonds=[(0, 1, 2)]), "data.rigid_bonds"),
        (lambda: ModelConfig(n_layers=0), "model.n_layers"),
        (lambda: ModelConfig(time_emb_dim=3), "model.time_emb_dim"),
        (lambda: ModelConfig(rtol=0.0), "model.rtol"),
        (lambda: ModelConfig(gnn_ablation_mode="gat"), "model.gnn_ablation_mode"),
        (lambda: ModelConfig(backend="cuda"), "model.backend"),
        (lambda: ModelConfig(precision="fp16"), "model.precision"),
        (lambda: ModelConfig(no_fourier=True), "model.fourier_basis"),
        (lambda: ModelConfig(fourier_basis=None), "model.fourier_basis"),
        (lambda: OptimConfig(lr=float("nan")), "optim.lr"),
        (lambda: OptimConfig(patience=0), "optim.patience"),
        (lambda: OptimConfig(dtype="float16"), "optim.dtype"),
        (lambda: OptimConfig(seed=-1), "optim.seed"),
        (lambda: TrainConfig(output=""), "output"),
        (lambda: TrainConfig(device="tpu"), "device"),
        (lambda: TrainConfig(max_seconds=0), "max_seconds"),
        (lambda: ModelConfig(max_attempts=0), "model.max_attempts"),
        (lambda: TrainConfig(log_every=0), "log_every"),
    ],
)
def test_bad_values_name_the_field(make, name):
    with pytest.raises(ConfigError, match=rf"^config: `{name}` must be .*, got .*; "):
        make()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"optimm": {}}, "`optimm`"),
        ({"optim": {"learning_rate": 1.0}}, "`optim.learning_rate`"),
        ({"optim": 3}, "`optim`"),
    ],
)
def test_unknown_keys_are_refused(values, name):
    with pytest.raises(ConfigError, match=name):
        config_from_dict(values)


def test_differences_leave_out_what_cannot_change_a_number(tmp_path):
    old = small_config(tmp_path / "a.npz", tmp_path / "one")
    same = small_config(
        tmp_path / "a.npz", tmp_path / "two", max_steps=3, max_seconds=9.0, checkpoint_every=1,
        model={"max_attempts": 64},
    )  # fmt: skip
    assert differences(old, same) == []
    other = small_config(tmp_path / "b.npz", tmp_path / "one", optim={"lr": 0.5})
    assert [text.split(":")[0] for text in differences(old, other)] == [
        "data.trajectory",
        "optim.lr",
    ]
