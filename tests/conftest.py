"""Eight virtual CPU devices and a persistent compilation cache, set before jax is imported."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
cache = os.environ.get("JAXPOST_CACHE", str(pathlib.Path.home() / ".cache" / "jaxpost" / "xla"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
