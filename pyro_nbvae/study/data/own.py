"""The user's own data: a folder of images, a ``.npy``, ``.npz``, ``.h5ad``, ``.csv`` or ``.tsv`` file.

A fold of the observations is held out (:class:`~pyro_nbvae.study.tree.Reading`; a tenth, drawn at random, by default),
unless the data say which ones are.
"""

from __future__ import annotations

from pathlib import Path

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data.arrays import as_tensors, check_read, column_of, hold_out, read_npy, read_npz
from pyro_nbvae.study.data.base import Source, Split
from pyro_nbvae.study.data.pictures import folder_source, picture_suffixes
from pyro_nbvae.study.data.recordings import read_h5ad, read_recording
from pyro_nbvae.study.data.sheets import read_sheet
from pyro_nbvae.study.tree import DEFAULT_READING, Reading

# How to convert files of other formats; {0} is the file and {1} the new one, without its suffix.
_TO_NPY = 'numpy.save("{1}.npy", {2})'
_ADVICE = {
    (".mat",): _TO_NPY.replace("{2}", 'scipy.io.loadmat("{0}")["NAME"]'),
    (".h5", ".hdf5", ".hdf"): _TO_NPY.replace("{2}", 'h5py.File("{0}")["NAME"][:]'),
    (".parquet",): 'pandas.read_parquet("{0}").to_csv("{1}.csv", index=False)',
    (".feather",): 'pandas.read_feather("{0}").to_csv("{1}.csv", index=False)',
    (".xlsx", ".xls", ".ods"): 'pandas.read_excel("{0}").to_csv("{1}.csv", index=False)',
    (".json",): 'pandas.read_json("{0}").to_csv("{1}.csv", index=False)',
    (".jsonl",): 'pandas.read_json("{0}", lines=True).to_csv("{1}.csv", index=False)',
    (".pkl", ".pickle"): _TO_NPY.replace("{2}", 'numpy.asarray(pandas.read_pickle("{0}"))'),
    (".pt", ".pth"): _TO_NPY.replace("{2}", 'torch.load("{0}").numpy()'),
    (".txt", ".dat"): _TO_NPY.replace("{2}", 'numpy.loadtxt("{0}", ndmin=2)'),
}


def _read_npz(path: Path, reading: Reading) -> Split:
    arrays = read_npz(path)
    names = set(arrays)
    if "counts" in names:
        return read_recording(path, arrays, reading)
    if names <= {"train", "test", "train_labels", "test_labels"} and names >= {"train", "test"}:
        check_read(f"{path} holds train and test", reading)
        train, test = as_tensors(path, {k: arrays[k] for k in ("train", "test")})
        return Split(train, test, arrays.get("train_labels"), arrays.get("test_labels"))
    data = names - {reading.labels, reading.group}
    if len(data) == 1:
        (only,) = data
        (x,) = as_tensors(path, {only: arrays[only]})
        optional = reading.labels == DEFAULT_READING.labels or reading.whole
        labels = arrays.get(reading.labels) if optional else column_of(path, reading.labels, arrays)
        whole = reading.group is None or reading.whole
        return hold_out(x, labels, reading, None if whole else column_of(path, str(reading.group), arrays))
    raise InputError(
        f"{path} holds {', '.join(arrays) or 'nothing'}: expected the array counts (and mask, exposure, "
        "covariates, labels, trial, session), train and test (and train_labels, test_labels), or one array (and "
        "labels, or what --labels and --group name)"
    )


def _read_npy(path: Path, reading: Reading) -> Split:
    check_read(f"{path} holds one array", reading, "folds", "fold", "split")
    (x,) = as_tensors(path, {"array": read_npy(path)})
    return hold_out(x, None, reading)


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".h5ad": read_h5ad, ".csv": read_sheet, ".tsv": read_sheet}


def _advice(path: Path) -> str:
    """Return how to convert a file that is not read."""
    suffix = path.suffix.lower()
    for suffixes, command in _ADVICE.items():
        if suffix in suffixes:
            return f"convert it in Python: {command.format(path, path.with_suffix(''))}"
    if suffix in picture_suffixes():
        return f"give the folder of the images, {path.parent}"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"):
        return "unpack it and give the folder or the file in it"
    return f'save its numbers in Python: numpy.save("{path.with_suffix("")}.npy", array)'


def own_source(path: Path, reading: Reading) -> Source:
    """Return the source of a folder of images, or of a ``.npy``, ``.npz``, ``.h5ad``, ``.csv`` or ``.tsv`` file.

    A folder is read as :func:`~pyro_nbvae.study.data.pictures.folder_source` says, and a table as
    :func:`~pyro_nbvae.study.data.sheets.read_sheet`. An array is (N, *event_shape): uint8 arrays (N, 1 or 3, H, W) are
    pixels, scaled to [0, 1]; all other values, and 0 and 1 alone, are used unchanged. A ``.npz`` file holds a recording
    (:func:`~pyro_nbvae.study.data.recordings.split_counts`), ``train`` and ``test`` (and ``train_labels``,
    ``test_labels``), or one array (and ``labels``).

    Args:
        path: the folder or the file.
        reading: which arrays are labels and groups, and which part is held out.

    Raises:
        InputError: for a file that is none of these, and a folder without images.
    """
    if path.is_dir():
        return folder_source(path, reading)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give a registered name (--import its module), a folder of images, or a .npy, "
            ".npz, .h5ad, .csv or .tsv file"
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is not a .npy, .npz, .h5ad, .csv or .tsv file: {_advice(path)}")
    try:
        split = reader(path, reading)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    return Source(tuple(split[0].shape[1:]), lambda _: split)
