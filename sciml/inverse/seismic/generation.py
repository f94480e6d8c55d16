"""Make seismic data sets like OpenFWI from velocity maps and the wave equation.

A data set can be written shard by shard. A shard gets its name only when it is complete, so a
run that is killed leaves whole shards, and the same call goes on with those that are missing.

References
----------
.. [1] C. Deng et al., "OpenFWI: Large-scale multi-structural benchmark datasets for full
   waveform inversion", NeurIPS 2022. arXiv:2111.02926
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from ... import __version__
from ..._check import check_choice, check_integer
from .acoustic_wave import AcousticWavePhysics
from .survey import Survey
from .velocity_maps import VELOCITY_KINDS, base_seed, make_velocity_maps
from .xarray_dataset import seismic_dataset

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["make_openfwi_like", "open_shards"]

_MANIFEST = "dataset.json"
_SUFFIX = {"netcdf": ".nc", "zarr": ".zarr"}
_N_ABSORBING = 20  # cells of the absorbing layer


def make_openfwi_like(
    kind: str = "flat_vel_a",
    n_samples: int = 100,
    *,
    survey: Survey | None = None,
    shape: tuple[int, int] = (70, 70),
    random_state: int | np.random.RandomState | None = None,
    path: str | os.PathLike[str] | None = None,
    format: str = "netcdf",
    shard_size: int = 50,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> xr.Dataset:
    """Generate velocity models of a family and the shot gathers recorded over them.

    Parameters
    ----------
    kind : str, default="flat_vel_a"
        Family, one of `VELOCITY_KINDS`.
    n_samples : int, default=100
        Number of models.
    survey : Survey, optional
        Geometry; by default that of OpenFWI.
    shape : (int, int), default=(70, 70)
        Cells of a model along depth and x.
    random_state : int, RandomState instance or None, default=None
        Seed. The result depends on neither `n_jobs` nor `shard_size`.
    path : path, optional
        Folder to write shards to. If it holds some shards of the same data set already, only
        the missing ones are made. By default all is kept in memory.
    format : {"netcdf", "zarr"}, default="netcdf"
        Format of the shards.
    shard_size : int, default=50
        Models a shard, and a task of a worker.
    n_jobs : int, optional
        Processes, as in joblib: each works on one shard at a time with a single thread.
        Inside ``joblib.parallel_config("dask")`` the shards go to the workers of a Dask
        cluster, which must see the same `path`.
    verbose : int, default=0
        With 1, show a progress bar.

    Returns
    -------
    xarray.Dataset
        As `seismic_dataset` describes; loaded, unless `path` is given: then opened lazily with
        one dask chunk a shard if dask is installed, and loaded otherwise.

    Raises
    ------
    ValueError
        If an argument is out of range, or `path` holds another data set.

    Examples
    --------
    >>> from sciml.inverse.seismic import Survey, make_openfwi_like
    >>> survey = Survey.line(32, n_shots=2, dx=20.0, dt=2e-3, nt=200, peak_frequency=10.0)
    >>> dataset = make_openfwi_like("curve_vel_a", 4, survey=survey, shape=(32, 32),
    ...                             random_state=0)
    >>> dataset["seismic"].dims, dataset["velocity"].shape
    (('sample', 'shot', 'time', 'receiver'), (4, 32, 32))
    """
    check_choice("kind", kind, VELOCITY_KINDS)
    check_choice("format", format, tuple(_SUFFIX))
    check_integer("n_samples", n_samples, 1)
    check_integer("shard_size", shard_size, 1)
    survey = Survey() if survey is None else survey
    survey.check_grid(shape)

    shards = [
        (first, min(shard_size, n_samples - first)) for first in range(0, n_samples, shard_size)
    ]
    parallel = Parallel(n_jobs=n_jobs, return_as="generator")
    if path is None:
        seed = base_seed(random_state)
        results = parallel(
            delayed(_simulate)(kind, first, count, shape, seed, survey) for first, count in shards
        )
        parts = list(tqdm(results, total=len(shards), disable=not verbose, unit="shard"))
        velocity = np.concatenate([part[0] for part in parts])
        seismic = np.concatenate([part[1] for part in parts])
        return seismic_dataset(seismic, velocity, survey).assign_attrs(_about(kind, seed))

    folder = Path(path)
    seed = _claim(
        folder,
        random_state,
        {
            "kind": kind,
            "n_samples": n_samples,
            "shape": list(shape),
            "format": format,
            "shard_size": shard_size,
            "survey": _plain(asdict(survey)),
        },
    )
    missing = [shard for shard in shards if not _shard_path(folder, shard[0], format).exists()]
    results = parallel(
        delayed(_write_shard)(folder, format, kind, first, count, shape, seed, survey)
        for first, count in missing
    )
    for _ in tqdm(results, total=len(missing), disable=not verbose, unit="shard"):
        pass
    return open_shards(folder, chunks={} if _dask_is_installed() else None)


def open_shards(
    path: str | os.PathLike[str], *, chunks: dict[str, int] | None = None
) -> xr.Dataset:
    """Open what `make_openfwi_like` wrote.

    Parameters
    ----------
    path : path
        The folder.
    chunks : dict, optional
        Dask chunk sizes by dimension, ``{}`` for one chunk a shard. By default all is loaded.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    FileNotFoundError
        If the folder holds no data set.
    ValueError
        If shards are missing: the message says how to make them.
    """
    import xarray as xr

    folder = Path(path)
    if not (folder / _MANIFEST).exists():
        raise FileNotFoundError(f"{folder} holds no {_MANIFEST}; make_openfwi_like writes one")
    about = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    firsts = range(0, about["n_samples"], about["shard_size"])
    files = [_shard_path(folder, first, about["format"]) for first in firsts]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} of {len(files)} shards, first {absent[0]}; call "
            "make_openfwi_like with the same arguments to make them"
        )
    if about["format"] == "zarr":
        parts = [xr.open_zarr(file, chunks=chunks, consolidated=False) for file in files]
    else:
        parts = [xr.open_dataset(file, chunks=chunks) for file in files]
    dataset = xr.concat(parts, dim="sample") if len(parts) > 1 else parts[0]
    return dataset if chunks is not None else dataset.load()


def _simulate(
    kind: str, first: int, count: int, shape: tuple[int, int], seed: int, survey: Survey
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    velocity = make_velocity_maps(kind, count, shape=shape, random_state=seed, first_sample=first)
    physics = AcousticWavePhysics(survey, pml_width=_N_ABSORBING)
    seismic = np.empty((count, survey.n_shots, survey.nt, survey.n_receivers), dtype=np.float32)
    # One thread a process: the loops are short and threads would wait for each other.
    threads = torch.get_num_threads()
    with threadpool_limits(limits=1), torch.no_grad():
        torch.set_num_threads(1)
        try:
            for i in range(count):
                seismic[i] = physics.A(torch.from_numpy(velocity[i])[None, None])[0].numpy()
        finally:
            torch.set_num_threads(threads)
    return velocity, seismic


def _write_shard(
    folder: Path,
    format: str,
    kind: str,
    first: int,
    count: int,
    shape: tuple[int, int],
    seed: int,
    survey: Survey,
) -> None:
    velocity, seismic = _simulate(kind, first, count, shape, seed, survey)
    dataset = seismic_dataset(seismic, velocity, survey, first_sample=first)
    dataset = dataset.assign_attrs(_about(kind, seed))
    target = _shard_path(folder, first, format)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    if format == "zarr":
        dataset.to_zarr(part, mode="w", consolidated=False)
    else:
        dataset.to_netcdf(part)
    os.replace(part, target)


def _claim(
    folder: Path, random_state: int | np.random.RandomState | None, about: dict[str, Any]
) -> int:
    """Write the manifest of a new data set, or check that of one begun; return the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / _MANIFEST
    if not manifest.exists():
        about["seed"] = base_seed(random_state)
        part = manifest.with_suffix(".json.part")
        part.write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.replace(part, manifest)
        return int(about["seed"])
    begun = json.loads(manifest.read_text(encoding="utf-8"))
    if random_state is not None:
        about["seed"] = base_seed(random_state)
    for name, value in about.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{folder} holds another data set: its {name} is {begun.get(name)!r}, "
                f"asked for was {value!r}"
            )
    for leftover in folder.glob("*.part"):
        # What a killed run was writing.
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return int(begun["seed"])


def _about(kind: str, seed: int) -> dict[str, Any]:
    """Attributes that say how the samples were made."""
    return {
        "kind": kind,
        "seed": seed,
        "n_absorbing": _N_ABSORBING,
        "generator": f"sciml-kit {__version__}",
    }


def _shard_path(folder: Path, first: int, format: str) -> Path:
    return folder / f"samples-{first:07d}{_SUFFIX[format]}"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in value.items()}


def _dask_is_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("dask") is not None
