"""Choice of configurations by measurement, enabled by `INT8COMPILE_AUTOTUNE=1`; results are kept on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from int8compile.cache import cache_folder
from int8compile.environment import is_on
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.launch import Launch
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config

log = logging.getLogger(__name__)

# Returns the milliseconds that a call takes.
Measure = Callable[[Callable[[], None]], float]
LaunchOf = Callable[[Product, Config], Launch]


def enabled() -> bool:
    """Return whether the environment variable INT8COMPILE_AUTOTUNE enables measurements.

    Raises:
        ConfigError: Its value is neither 0 nor 1.
    """
    return is_on("INT8COMPILE_AUTOTUNE", default=False)


def choose(product: Product, configs: tuple[Config, ...], multiprocessors: int, launch_of: LaunchOf) -> Config:
    """Return a product's configuration: the table's choice, or the fastest if measurements are enabled."""
    if not enabled() or len(configs) == 1:
        return tables.choose(configs, *product.sizes, multiprocessors)
    return _cache(product.y.device.index).choose(product, configs, multiprocessors, launch_of)


class Cache:
    """A file of the fastest configurations, by the sizes and kinds of products.

    Attributes:
        path: The file: one JSON object.
    """

    def __init__(self, path: Path, measure: Measure) -> None:
        """Read the file; a file that cannot be read counts as empty."""
        self.path = path
        self._measure = measure
        self._lock = threading.Lock()
        self._found = self._read()

    def choose(
        self, product: Product, configs: tuple[Config, ...], multiprocessors: int, launch_of: LaunchOf
    ) -> Config:
        """Return the fastest of the configurations, after measuring them if it is not known yet.

        Nothing can be measured while a CUDA graph is captured; the table's choice is returned then. Configurations are
        stored without splits, and the table sets the splits for this number of rows. So a result holds for all numbers
        of rows in its bucket.
        """
        m, n, k = product.sizes
        kind = f"{len(product.q)}{product.activation}"
        key = f"{tables.bucket_of(m)} {n} {k} {kind}"
        named = {str(config): tables.choose((config,), m, n, k, multiprocessors) for config in configs}
        with self._lock:
            known = named.get(self._found.get(key, ""))
            if known is not None:
                return known
            if product.y.is_cuda and torch.cuda.is_current_stream_capturing():
                return tables.choose(configs, m, n, k, multiprocessors)
            times = {name: self._measure(launch_of(product, config).run) for name, config in named.items()}
            fastest = min(times, key=times.__getitem__)
            log.info("%s: %s of %s", key, fastest, times)
            # Other processes may have written since.
            self._found = {**self._read(), **self._found, key: fastest}
            self._write()
        return named[fastest]

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s); it will be made again", self.path, error)
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Written elsewhere and renamed: another process may read the file at any time.
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(self._found, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.path, error)


def path_for(device: str) -> Path:
    """Return the path of a device's file; its name changes with the version of Triton and with the tables."""
    tables_now = hashlib.sha256(repr(tables.ARCHITECTURES).encode()).hexdigest()[:12]
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    return cache_folder() / "autotune" / f"{name}-triton-{triton.__version__}-{tables_now}.json"


@functools.cache
def _cache(device: int | None) -> Cache:
    def measure(call: Callable[[], None]) -> float:
        return float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median"))

    return Cache(path_for(torch.cuda.get_device_name(device)), measure)
