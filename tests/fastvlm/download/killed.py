"""The function that test_download kills: a download. All that takes time is done before."""

import sys
from pathlib import Path

from huggingface_hub import constants, get_token  # noqa: F401

from fastvlm.checkpoint import exported  # noqa: F401
from fastvlm.download import download, fetch
from tests.fastvlm.download.download_server import QUICK, lenient_checkpoint

fetch.client()


def get(name: str, folder: str, overwrite: bool) -> None:
    sys.modules["fastvlm.checkpoint.checkpoint"] = lenient_checkpoint()
    download.download(name, Path(folder), overwrite=overwrite, retries=QUICK)
