"""CUDA C++ to cubins by the real NVRTC, which needs no GPU; and the cache under several processes, kills, damage and full disks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch

from slidesparse import doctor, jit
from slidesparse.errors import CompileError, UnsupportedError
from slidesparse.jit import cache, compiler, nvrtc

try:
    nvrtc.toolchain()
except UnsupportedError as missing:
    pytest.skip(f"no NVRTC: {missing}", allow_module_level=True)

FILL = 'extern "C" __global__ void fill(int* p) { p[threadIdx.x] = VALUE; }\n'
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* p) {
    float kept[64];
    #pragma unroll
    for (int i = 0; i < 64; i++) kept[i] = p[i];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; i++) p[i + threadIdx.x] = kept[63 - i];
}
"""
COUNTING = f"""
import filelock, logging, os
from slidesparse import jit
from slidesparse.jit import compiler
FILL = {FILL!r}
logging.basicConfig(format="%(message)s")
real = compiler._build
real(jit.Job(FILL, "fill", constants={{"VALUE": 0}}))  # loads all that is loaded late
def counting(job):
    os.write(1, b"built\\n")
    return real(job)
compiler._build = counting
def fill(value):
    return jit.compile(FILL, name="fill", constants={{"VALUE": value}})
"""
"""The start of a script whose process writes ``built`` for every compilation."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, also for processes started here, and no warning said before."""
    monkeypatch.setenv("SLIDESPARSE_CACHE", str(tmp_path / "cache"))
    cache._store.cache_clear()
    cache._warn.cache_clear()
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that this process compiles."""
    names, real = [], compiler._build
    monkeypatch.setattr(compiler, "_build", lambda job: names.append(job.name) or real(job))
    return names


def start(script: str) -> subprocess.Popen[str]:
    code = COUNTING + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def fill(value: int | str = 3) -> jit.Binary:
    return jit.compile(FILL, name="fill", constants={"VALUE": value})


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "entries").rglob("*") if path.is_file()]


def test_a_kernel_is_an_elf_for_the_card_with_its_resources() -> None:
    binary = fill()
    assert binary.cubin[:4] == b"\x7fELF" and int.from_bytes(binary.cubin[18:20], "little") == 190  # EM_CUDA
    assert (binary.name, binary.arch) == ("fill", "sm_90a")
    assert 0 < binary.resources.registers <= 32 and not binary.resources.local and not binary.resources.spills


def test_spills_and_local_memory_are_seen() -> None:
    spilling = jit.compile(SPILLING, name="spilling").resources
    assert spilling.registers == 32 and spilling.spills > 0 and spilling.local > 0
    indexed = 'extern "C" __global__ void f(int* p) { int a[64]; for (int i = 0; i < 64; i++) a[(i * p[1]) & 63] = p[i]; p[0] = a[p[2]]; }'
    found = jit.compile(indexed, name="f").resources
    assert found.local >= 256 and not found.spills


def test_a_kernel_keeps_its_resources_in_the_cache(builds: list[str]) -> None:
    first, second = (jit.compile(SPILLING, name="spilling") for _ in range(2))
    assert first == second and builds == ["spilling"]


def test_without_a_report_there_are_no_resources_and_the_kernel_is_kept_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_resources", lambda log, real=compiler._resources: real(""))
    first, second = fill(3), fill(3)
    assert first.resources is None and second == first and first.cubin


def test_another_process_compiles_the_same_bytes(folder: Path) -> None:
    here = fill()
    for path in entries(folder):
        path.unlink()
    out, _ = finish(start("import hashlib; print(hashlib.sha256(fill(3).cubin).hexdigest())"))
    assert out.split() == ["built", hashlib.sha256(here.cubin).hexdigest()]


def test_an_error_is_one_line_with_the_first_of_the_compiler() -> None:
    with pytest.raises(CompileError, match=r"^kernel 'fill' does not compile for sm_90a: fill\.cu\(1\): error: .*VALUE.*$"):
        jit.compile(FILL, name="fill")
    with pytest.raises(CompileError, match="error"):
        jit.compile('extern "C" __global__ void f() { asm("nonsense;"); }', name="f")
    with pytest.raises(CompileError, match="sm_12345"):
        jit.compile(FILL, name="fill", arch="sm_12345", constants={"VALUE": 1})
    with pytest.raises(CompileError, match=r"no kernel 'other', but fill: is it extern"):
        jit.compile(FILL, name="other", constants={"VALUE": 1})


def test_an_include_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "near.h").write_text("#define VALUE 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompileError, match=r"near\.h"):
        jit.compile('#include "near.h"\n' + FILL, name="fill")


def test_everything_that_a_cubin_depends_on_is_in_its_key(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cubins = [fill(1).cubin, fill(2).cubin, jit.compile(FILL, name="fill", arch="sm_80", constants={"VALUE": 1}).cubin]
    cubins.append(jit.compile(FILL.replace("VALUE", "VALUE + 1"), name="fill", constants={"VALUE": 7}).cubin)
    assert len(set(cubins)) == len(builds) == 4
    assert fill("1").cubin == fill(True).cubin == cubins[0] and len(builds) == 4
    newer = jit.Toolchain(jit.toolchain().version, "another build")
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "toolchain", lambda: newer)
        fill(1)
    assert len(builds) == 5
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_LAYOUT", compiler._LAYOUT + 1)
        fill(1)
    assert len(builds) == 6
    fill(1)
    assert len(builds) == 6


def test_another_build_of_nvrtc_of_the_same_size_has_another_identity(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(bytes(1 << 20))
    two.write_bytes(bytes((1 << 20) - 1) + b"\1")
    assert nvrtc._identity(one) != nvrtc._identity(two)


def test_many_compile_at_once_equal_ones_once_and_in_order(builds: list[str]) -> None:
    jobs = [jit.Job(FILL, "fill", constants={"VALUE": value}) for value in (1, 2, 3, 1)]
    made = jit.compile_all(jobs)
    assert len(builds) == 3 and made[0] == made[3]
    assert [binary.cubin for binary in made] == [fill(value).cubin for value in (1, 2, 3, 1)]
    assert jit.compile_all([]) == []


def test_kernels_that_share_a_lock_wait_for_each_other() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda letter: cache.cached("00" + letter, letter.encode), "abcdefgh"))
    assert found == [letter.encode() for letter in "abcdefgh"]


def test_eight_processes_compile_a_kernel_once() -> None:
    script = """
    import multiprocessing
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(8), context.Queue()
    def child():
        barrier.wait()
        found.put(fill(5))
    children = [context.Process(target=child) for _ in range(8)]
    for one in children:
        one.start()
    results = [found.get(timeout=60) for _ in children]
    print(len(results), all(one == results[0] for one in results))
    """
    out, err = finish(start(script))
    assert out.split() == ["built", "8", "True"] and not err


def test_a_process_killed_while_it_writes_leaves_nothing_wrong(
    folder: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
    import time
    def hanging(*_):
        os.write(1, b"writing\\n")
        time.sleep(60)
    os.fsync = hanging
    fill(3)
    """
    process = start(script)
    assert process.stdout.readline() == "built\n" and process.stdout.readline() == "writing\n"
    assert any((folder / "tmp").iterdir()) and not entries(folder)
    process.kill()
    process.communicate()
    monkeypatch.setattr(cache, "_PATIENCE", 0)
    assert fill().cubin and fill().cubin and builds == ["fill"]
    assert not caplog.records, "the dead process's lock still holds"


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:], lambda _: b""])
def test_a_damaged_entry_is_compiled_again_and_replaced(damage, folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    good = fill()
    (path,) = entries(folder)
    path.write_bytes(damage(path.read_bytes()))
    assert fill() == good and builds == ["fill", "fill"] and "damaged" in caplog.text
    assert fill() == good and len(builds) == 2


def test_an_entry_under_another_key_is_no_hit(folder: Path, builds: list[str]) -> None:
    one, two = fill(1), fill(2)
    paths = entries(folder)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert (fill(1), fill(2)) == (one, two) and len(builds) == 4


@pytest.mark.parametrize("filled", [False, True])
def test_a_folder_that_may_not_be_written_is_done_without(filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root writes where it likes, so the processes become nobody, who may not enter pytest's folders.
    nobody = "if os.geteuid() == 0: os.setuid(65534)\n"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        monkeypatch.setenv("SLIDESPARSE_CACHE", name)
        if os.geteuid() == 0:
            os.chown(root, 65534, 65534)
        if filled:
            finish(start(nobody + "fill(3)"))
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            out, err = finish(start(nobody + "for value in (3, 4): print(fill(value).name, flush=True)"))
        finally:
            for path in folders:
                path.chmod(0o755)
    assert out.split() == (["fill", "built", "fill"] if filled else ["built", "fill"] * 2)
    assert len(err.splitlines()) == 1 and "cannot be kept" in err and "denied" in err


def test_a_full_disk_is_done_without(folder: Path) -> None:
    # No file may grow beyond a hundred bytes.
    script = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    for value in (3, 4):
        print(fill(value).name, flush=True)
    """
    out, err = finish(start(script))
    assert out.split() == ["built", "fill"] * 2
    assert len(err.splitlines()) == 1 and "cannot be kept" in err and "large" in err
    assert not entries(folder) and not list((folder / "tmp").iterdir())


def test_no_home_is_done_without(builds: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache, "cache_folder", homeless)
    assert fill() == fill() and len(builds) == 2
    assert len(caplog.records) == 1 and "home" in caplog.text


def test_the_cache_stays_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LIMIT", 20_000)
    for value in range(12):
        fill(value)
    assert 0 < sum(path.stat().st_size for path in entries(folder)) <= 20_000


def test_a_cached_kernel_is_there_at_once(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fill()
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda *_: pytest.fail("waits for a lock"))
    began = time.process_time()  # what others do on the machine does not count
    for _ in range(10):
        fill()
    assert (time.process_time() - began) / 10 < 0.05 and len(builds) == 1


def test_the_wrong_nvrtc_and_none_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    look = nvrtc.toolchain.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(UnsupportedError, match=r"NVRTC is 13\.\d+, torch has CUDA 12\.6; pip install nvidia-cuda-nvrtc-cu12"):
        look()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'slidesparse\[cuda\]'"):
        look()


def test_doctor_names_the_compiler() -> None:
    (finding,) = [finding for finding in doctor.diagnose() if finding.what == "nvrtc"]
    assert finding.ok and finding.found == jit.toolchain().version


def test_a_kernel_for_another_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    for capability in ((8, 0), (10, 0), (9, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        with pytest.raises(UnsupportedError, match="built for sm_90a, A card is sm_"):
            jit.load(fill())


@pytest.mark.needs_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loaded_kernel_runs() -> None:
    from cuda.core import Device, LaunchConfig, launch

    major, minor = torch.cuda.get_device_capability()
    kernel = jit.load(jit.compile(FILL, name="fill", arch=f"sm_{major}{minor}", constants={"VALUE": 42}))
    out = torch.zeros(32, dtype=torch.int32, device="cuda")
    device = Device(out.device.index)
    device.set_current()
    launch(device.create_stream(torch.cuda.current_stream()), LaunchConfig(grid=1, block=32), kernel, out.data_ptr())
    assert out.tolist() == [42] * 32
