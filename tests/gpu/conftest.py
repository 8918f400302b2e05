"""Where the library is, and what happens without a GPU: every test is skipped, and counted."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pytest_addoption(parser):
    parser.addoption("--library", help="path of libflash_entmax_c.so",
                     default=str(ROOT / "build/gpu/bindings/c/libflash_entmax_c.so"))


def pytest_configure(config):
    config.addinivalue_line("markers", "host_only: needs no GPU")


def pytest_collection_modifyitems(items):
    try:
        import torch
        reason = None if torch.cuda.is_available() else "no GPU"
    except ImportError:
        reason = "PyTorch is not installed"
    for item in items:
        if reason and "host_only" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def library(request):
    from engine import Library
    return Library(request.config.getoption("--library"))
