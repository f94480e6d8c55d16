"""Read seismic data laid out as OpenFWI: memory-mapped npy files, annotations, normalisation.

A file of recordings has shape (sample, shot, time, receiver), the file of models beside it
(sample, 1, depth, x) [1]_. Names are ``data{i}.npy`` and ``model{i}.npy`` (Vel and Style) or
``seis{...}.npy`` and ``vel{...}.npy`` (Fault).

References
----------
.. [1] C. Deng et al., "OpenFWI: Large-scale multi-structural benchmark datasets for full
   waveform inversion", NeurIPS 2022. arXiv:2111.02926
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..._check import check_choice, check_finite, check_interval
from .generation import open_shards
from .survey import Survey
from .xarray_dataset import seismic_dataset

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "OPENFWI_STATISTICS",
    "OpenFWIDataset",
    "SeismicStatistics",
    "denormalize_velocity",
    "normalize_velocity",
    "open_openfwi",
    "standardize_seismic",
]

Array = TypeVar("Array", NDArray[np.floating[Any]], torch.Tensor)


class SeismicStatistics(NamedTuple):
    """Mean and standard deviation of the recordings of a data set."""

    mean: float
    std: float


#: Statistics of the recordings of the ten OpenFWI subsets, by lower-case name.
OPENFWI_STATISTICS = {
    "flat_vel_a": SeismicStatistics(-3.4e-5, 1.4797),
    "flat_vel_b": SeismicStatistics(-2e-4, 1.7832),
    "curve_vel_a": SeismicStatistics(-5.1e-5, 1.4870),
    "curve_vel_b": SeismicStatistics(-2e-4, 1.7648),
    "flat_fault_a": SeismicStatistics(-4.4e-4, 1.5410),
    "flat_fault_b": SeismicStatistics(-1e-4, 1.4952),
    "curve_fault_a": SeismicStatistics(-4.6e-4, 1.5449),
    "curve_fault_b": SeismicStatistics(-8.9e-5, 1.5023),
    "style_a": SeismicStatistics(2.5e-4, 1.4618),
    "style_b": SeismicStatistics(1.3e-4, 1.4579),
}


def normalize_velocity(velocity: Array, low: float = 1500.0, high: float = 4500.0) -> Array:
    """Map velocities from [low, high] m/s to [-1, 1].

    Parameters
    ----------
    velocity : ndarray or Tensor
        Velocity in m/s.
    low, high : float, default=1500.0, 4500.0
        Ends of the range, by default those of OpenFWI.

    Returns
    -------
    ndarray or Tensor
        As `velocity`.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.inverse.seismic import normalize_velocity
    >>> normalize_velocity(np.array([1500.0, 3000.0, 4500.0]))
    array([-1.,  0.,  1.])
    """
    check_interval("high", high, low, closed="neither")
    return 2 * (velocity - low) / (high - low) - 1


def denormalize_velocity(normalized: Array, low: float = 1500.0, high: float = 4500.0) -> Array:
    """Map values from [-1, 1] back to velocities in [low, high] m/s.

    Parameters
    ----------
    normalized : ndarray or Tensor
        Output of `normalize_velocity` or of a network trained on it.
    low, high : float, default=1500.0, 4500.0
        Ends of the range in m/s.

    Returns
    -------
    ndarray or Tensor
        Velocity in m/s.
    """
    check_interval("high", high, low, closed="neither")
    return (normalized + 1) / 2 * (high - low) + low


def standardize_seismic(seismic: Array, statistics: SeismicStatistics) -> Array:
    """Subtract the mean and divide by the standard deviation of a data set.

    Parameters
    ----------
    seismic : ndarray or Tensor
        Recordings.
    statistics : SeismicStatistics
        Such as ``OPENFWI_STATISTICS["flat_vel_a"]``.

    Returns
    -------
    ndarray or Tensor
        As `seismic`.
    """
    check_interval("statistics.std", statistics.std, 0, closed="neither")
    return (seismic - statistics.mean) / statistics.std


class OpenFWIDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of recordings and velocity models from memory-mapped OpenFWI files.

    Parameters
    ----------
    annotation : path or sequence of (path, path)
        Annotation file with a line ``data.npy<TAB>model.npy`` a file pair, or the pairs.
    root : path, optional
        Folder that relative paths start from; by default that of the annotation file.
    statistics : str, SeismicStatistics or None, default=None
        What to standardise recordings with: the name of an OpenFWI subset, such as
        ``"flat_vel_a"``, or a mean and standard deviation. None leaves the recordings as they
        are. With statistics, velocities are mapped from [1500, 4500] m/s to [-1, 1] as well.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a line of the annotation, or the shape or content of a file is not as expected; the
        message names the file.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from pathlib import Path
    >>> from sciml.inverse.seismic import OpenFWIDataset
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "data1.npy", np.zeros((4, 5, 100, 70), np.float32))
    >>> np.save(folder / "model1.npy", np.full((4, 1, 70, 70), 3000, np.float32))
    >>> dataset = OpenFWIDataset([("data1.npy", "model1.npy")], folder, statistics="flat_vel_a")
    >>> seismic, velocity = dataset[0]
    >>> len(dataset), tuple(seismic.shape), float(velocity.mean())
    (4, (5, 100, 70), 0.0)
    """

    def __init__(
        self,
        annotation: str | os.PathLike[str] | Sequence[tuple[Any, Any]],
        root: str | os.PathLike[str] | None = None,
        *,
        statistics: str | SeismicStatistics | None = None,
    ) -> None:
        if isinstance(annotation, (str, os.PathLike)):
            root = Path(annotation).parent if root is None else Path(root)
            pairs: Sequence[tuple[Any, Any]] = _read_annotation(Path(annotation))
        else:
            root = Path() if root is None else Path(root)
            pairs = annotation
        if isinstance(statistics, str):
            check_choice("statistics", statistics, tuple(OPENFWI_STATISTICS))
            statistics = OPENFWI_STATISTICS[statistics]
        self.statistics = statistics
        self.files = [(root / data, root / model) for data, model in pairs]
        if not self.files:
            raise ValueError("annotation must name at least one pair of files, got none")
        self._open: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        lengths = [len(self._arrays(i)[0]) for i in range(len(self.files))]
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        index %= len(self)
        file = int(np.searchsorted(self._ends, index, side="right"))
        data, model = self._arrays(file)
        row = index - (int(self._ends[file - 1]) if file else 0)
        seismic = torch.from_numpy(np.array(data[row], dtype=np.float32))
        velocity = torch.from_numpy(np.array(model[row], dtype=np.float32))
        check_finite(f"sample {row} of {self.files[file][0]}", seismic)
        check_finite(f"sample {row} of {self.files[file][1]}", velocity)
        if self.statistics is None:
            return seismic, velocity
        return standardize_seismic(seismic, self.statistics), normalize_velocity(velocity)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file to every worker.
        return {**self.__dict__, "_open": {}}

    def _arrays(self, file: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if file not in self._open:
            self._open[file] = _open_pair(*self.files[file])
        return self._open[file]


def open_openfwi(
    path: str | os.PathLike[str],
    *,
    survey: Survey | None = None,
    chunks: dict[str, int] | None = None,
) -> xr.Dataset:
    """Open OpenFWI files, or the shards of `make_openfwi_like`, as one xarray Dataset.

    Parameters
    ----------
    path : path
        A folder with npy pairs (in it, or in ``data/`` and ``model/`` below it), a folder that
        `make_openfwi_like` wrote, or an annotation file.
    survey : Survey, optional
        Geometry that the npy files were recorded with; by default that of OpenFWI. Shards know
        theirs.
    chunks : dict, optional
        Chunk sizes by dimension, such as ``{"sample": 100}``, to read lazily through dask. By
        default everything is loaded.

    Returns
    -------
    xarray.Dataset
        Variables ``seismic`` (sample, shot, time, receiver) and ``velocity`` (sample, depth,
        x), with coordinates in s and m.

    Raises
    ------
    FileNotFoundError
        If there is nothing to open.
    ValueError
        If a file is truncated or misshapen (its name is given), or shards are missing.
    """
    import xarray as xr

    path = Path(path)
    if (path / "dataset.json").exists():
        return open_shards(path, chunks=chunks)
    if path.is_file():
        files = [(path.parent / a, path.parent / b) for a, b in _read_annotation(path)]
    else:
        files = _find_pairs(path)
    parts = []
    first = 0
    for data_file, model_file in files:
        data, model = _open_pair(data_file, model_file)
        if chunks is not None:
            import dask.array

            rows = chunks.get("sample", len(data))
            data = dask.array.from_array(data, chunks=(rows, *data.shape[1:]))
            model = dask.array.from_array(model, chunks=(rows, *model.shape[1:]))
        parts.append(seismic_dataset(data, model[:, 0], survey, first_sample=first))
        first += len(data)
    dataset = xr.concat(parts, dim="sample") if len(parts) > 1 else parts[0]
    return dataset if chunks is not None else dataset.load()


def _read_annotation(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        names = line.split("\t")
        if len(names) != 2:
            raise ValueError(f"line {number} of {path} must be 'data<TAB>model', got {line!r}")
        pairs.append((names[0].strip(), names[1].strip()))
    return pairs


def _find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    pairs = []
    for data_prefix, model_prefix in (("data", "model"), ("seis", "vel")):
        found = [*folder.glob(f"{data_prefix}*.npy"), *folder.glob("data/*.npy")]
        for data_file in sorted(found, key=_by_number):
            if not data_file.name.startswith(data_prefix):
                continue
            name = model_prefix + data_file.name[len(data_prefix) :]
            beside = data_file.with_name(name)
            apart = folder / "model" / name
            if not beside.exists() and not apart.exists():
                raise FileNotFoundError(f"{data_file} has no {name} beside it or in {apart.parent}")
            pairs.append((data_file, beside if beside.exists() else apart))
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no data*.npy or seis*.npy files")
    return pairs


def _by_number(path: Path) -> tuple[str, list[int], str]:
    """Sort key that puts data10.npy after data2.npy."""
    return str(path.parent), [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name


def _open_pair(data_file: Path, model_file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    data = _open_npy(data_file, "(n_samples, n_shots, nt, n_receivers)")
    model = _open_npy(model_file, "(n_samples, 1, nz, nx)")
    if model.shape[1] != 1:
        raise ValueError(f"{model_file} must have shape (n_samples, 1, nz, nx), got {model.shape}")
    if len(data) != len(model):
        raise ValueError(
            f"{data_file} and {model_file} must have as many samples, "
            f"got {len(data)} and {len(model)}"
        )
    return data, model


def _open_npy(path: Path, expected: str) -> NDArray[Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected an npy file of shape {expected}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or no npy file ({error}); expected shape {expected}"
        ) from error
    if array.ndim != 4 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{path} must hold floating-point numbers of shape {expected}, "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array
