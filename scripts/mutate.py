"""Mutation run: break the core in one place at a time and see whether a test notices.

    python scripts/mutate.py                                        # every mutant of the core: hours
    python scripts/mutate.py --sample 300 --seconds 1800            # some of them, chosen by the seed
    python scripts/mutate.py diffusion_dpo/report/statistics.py     # those of one module
    python scripts/mutate.py --again                                # the survivors once more, after new tests

A mutant is one small change of the source: another operator, a constant one off, a condition turned around, a
statement or keyword argument left out, arguments or slices changed. The package and its tests are copied to a scratch
folder and a mutant exists there alone. This process imports the heavy libraries once and forks a child for each
mutant, which runs the tests that reach the line, the fastest first, until one fails. Results are lines of JSON: a run
that was stopped goes on, and what is known of a mutant holds until its file changes.
"""

import argparse
import collections
import contextlib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutants import Finder, Mutant

REPO = Path(__file__).resolve().parents[1]
COPIED = ("diffusion_dpo", "tests", "scripts", "configs", "docs", "notebooks", "pyproject.toml", "README.md")
CORE = {
    "losses/*.py": ["losses"],
    "training/errors.py": ["training/test_errors.py", "losses/test_weighting.py"],
    "training/batches.py": ["training/test_batches.py"],
    "training/averaging.py": ["training/test_averaging.py"],
    "training/reference.py": ["training/test_reference_errors.py"],
    "training/evaluation.py": ["training/test_evaluation.py"],
    "data/order.py": ["data/test_order.py"],
    "data/cache.py": ["data/test_cache.py"],
    "checkpoint.py": ["test_checkpoint.py"],
    "report/statistics.py": ["report/test_statistics.py"],
    "strategies/*.py": ["strategies"],
    "models/lora_file.py": ["models/test_lora_file.py"],
    "models/lora_layers.py": ["models/test_lora_file.py", "models/test_adapters.py"],
    "models/lora_write.py": ["models/test_lora_file.py"],
    "models/start.py": ["models/test_adapters.py"],
    "models/fused_lora.py": ["models/test_fused_lora.py"],
}
"""Modules of the core (in diffusion_dpo/) and the tests that must hold them (in tests/)."""
LEAST = 0.95
"""Share of the mutants that tests must kill."""
MEMORY_BYTES = 24 * 2**30
"""Address space of a child: a mutant may ask for any amount of memory."""


class Watch:
    """A pytest plugin that notes how long every test takes and which lines of some modules it reaches."""

    def __init__(self, repo: Path, modules: list[str]) -> None:
        self.seconds, self.failed = dict[str, float](), list[str]()
        self.lines: dict[str, dict[str, set[int]]] = {module: collections.defaultdict(set) for module in modules}
        self._modules = {str(repo / module): module for module in modules}
        self._now = ""  # no test in particular: what several may share

    def _trace(self, frame: Any, event: str, argument: Any) -> "Callable[..., Any] | None":
        module = self._modules.get(frame.f_code.co_filename)
        if module is None:
            return None
        self.lines[module][self._now].add(frame.f_lineno)
        return self._trace

    def pytest_sessionstart(self) -> None:
        sys.settrace(self._trace)
        threading.settrace(self._trace)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._now = item.nodeid
        yield
        self._now = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


class Chosen:
    """A pytest plugin that runs some tests, in their order, and notes the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.places, self.failed = {name: place for place, name in enumerate(tests)}, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((it for it in items if it.nodeid in self.places), key=lambda it: self.places[it.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


class Bench:
    """A scratch copy of the repository in which children run tests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repo = folder, folder / "repo"
        for name in COPIED:
            if (REPO / name).is_dir():
                shutil.copytree(REPO / name, self.repo / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(REPO / name, self.repo / name)
        os.environ |= {"PYTHONPATH": str(self.repo), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        sys.path.insert(0, str(self.repo))
        self._imported: set[str] = set()

    def baseline(self, modules: list[str], files: list[str]) -> dict[str, Any]:
        """Run the tests of modules as they are; return their seconds, their lines and the libraries that they load."""

        def work() -> dict[str, Any]:
            watch = Watch(self.repo, modules)
            self._pytest(files, watch)
            own = ("diffusion_dpo", "tests", "_pytest", "conftest", "__main__", "__mp_main__")
            libraries = [name for name in sys.modules if name.partition(".")[0] not in own]
            lines = {module: {name: sorted(some) for name, some in of.items()} for module, of in watch.lines.items()}
            return {"seconds": watch.seconds, "failed": watch.failed, "lines": lines, "libraries": libraries}

        found = self._child(work, 1800)
        if found is None or found["failed"] or not found["seconds"]:
            tail = "" if found else (self.folder / "log").read_text()[-2000:]
            sys.exit(f"the tests of {modules} do not pass as they are: {found['failed'] if found else tail}")
        for name in found["libraries"]:
            if name not in self._imported:
                self._imported.add(name)
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(name)
        return found

    def outcome(self, mutant: Mutant, source: str, tests: list[str], limit: float) -> tuple[str, str]:
        """Return "survived", or "killed" and the test that did it; "timeout" where the child took too long or died."""

        def work() -> list[str]:
            gc.freeze()  # the libraries, which a collection would go through again and again
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            chosen = Chosen(tests)
            code = self._pytest(["-x", *dict.fromkeys(name.partition("::")[0] for name in tests)], chosen)
            if code == pytest.ExitCode.NO_TESTS_COLLECTED:
                return ["no tests", ""]
            return ["survived" if code == pytest.ExitCode.OK else "killed", chosen.failed]

        path = self.repo / mutant.file
        stat = path.stat()
        path.write_text(mutant.apply(source))
        try:
            found = self._child(work, limit)
        finally:
            path.write_text(source)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the compiled file is valid again
        return tuple(found) if found else ("timeout", "")

    def _pytest(self, arguments: list[str], plugin: object) -> int:
        os.chdir(self.repo)
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", f"--basetemp={self.folder / 'tmp'}"]
        return pytest.main([*options, *arguments], plugins=[plugin])

    def _child(self, work: Callable[[], Any], limit: float) -> Any:
        """Return what a function returns in a child of its own; None if it takes too long or dies."""
        result, log = self.folder / "result.json", self.folder / "log"
        result.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            try:
                result.write_text(json.dumps(work()))
            finally:
                os._exit(0)
        end = time.monotonic() + limit
        try:
            while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < end:
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it started
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        return json.loads(result.read_text()) if result.exists() else None


def reaching(mutant: Mutant, known: dict[str, Any]) -> list[str]:
    """Return the tests that reach a mutant, the fastest first; all where that cannot be told."""
    lines = set(range(mutant.first, mutant.last + 1))
    reached = known["lines"][mutant.file]
    names = [name for name, found in reached.items() if name and lines & set(found)]
    if not mutant.in_function or not names or lines & set(reached.get("", ())):
        names = list(known["seconds"])
    return sorted(names, key=lambda name: known["seconds"][name])


def tests_of(module: str) -> list[str]:
    """Return the test files of a module of the core."""
    for pattern, names in CORE.items():
        if Path(module).match(f"diffusion_dpo/{pattern}"):
            return [f"tests/{name}" for name in names]
    sys.exit(f"{module} is not of the core; name its tests in CORE")


def modules_of(paths: list[str]) -> list[str]:
    """Return the modules that were asked for, all of the core where none was."""
    found = [Path(path).resolve() for path in paths] or [
        path for pattern in CORE for path in sorted((REPO / "diffusion_dpo").glob(pattern))
    ]
    return [str(path.relative_to(REPO)) for path in found]


def run(mutants: dict[str, list[tuple[str, Mutant]]], sources: dict[str, str], results: Path, seconds: float) -> None:
    """Try mutants by module until the time is up; append what became of each to the results."""
    end = time.monotonic() + seconds
    groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for module in mutants:
        groups[tuple(tests_of(module))].append(module)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, results.open("a") as file:
        bench = Bench(Path(folder))
        for files, modules in groups.items():
            known = bench.baseline(modules, list(files))
            limit = 30 + 5 * sum(known["seconds"].values())
            nothing = Mutant(modules[0], 0, 0, "", 1, 1, 1, False)
            outcome, test = bench.outcome(nothing, sources[modules[0]], list(known["seconds"]), limit)
            if outcome != "survived":  # or every mutant would seem to be killed
                sys.exit(f"the tests of {modules} do not pass in a child where nothing is changed: {test or outcome}")
            for key, mutant in [one for module in modules for one in mutants[module]]:
                if time.monotonic() > end:
                    return
                source, start = sources[mutant.file], time.monotonic()
                outcome, test = bench.outcome(mutant, source, reaching(mutant, known), limit)
                spent = round(time.monotonic() - start, 2)
                fact = {"key": key, "outcome": outcome, "test": test, "seconds": spent}
                file.write(json.dumps(fact | {"mutant": mutant.words(source)}) + "\n")
                file.flush()
                print(f"{outcome:8} {mutant.words(source)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="modules of the core; all by default")
    parser.add_argument("--sample", type=int, help="number of mutants to try, out of all")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sample")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--again", action="store_true", help="try those that survived before")
    parser.add_argument("--results", type=Path, default=REPO / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    sources = {module: (REPO / module).read_text() for module in modules_of(options.paths)}
    every = [(m.key(sources[m.file]), m) for module, text in sources.items() for m in Finder(module, text).found]
    chosen = random.Random(options.seed).sample(every, min(options.sample or len(every), len(every)))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    todo: dict[str, list[tuple[str, Mutant]]] = {module: [] for module in sources}
    for key, mutant in sorted(chosen, key=lambda one: (one[1].file, one[1].start)):
        if key not in known or (options.again and known[key] == "survived"):
            todo[mutant.file].append((key, mutant))
    run({module: some for module, some in todo.items() if some}, sources, options.results, options.seconds)
    share = report(chosen, read(options.results), sources, len(every))
    sys.exit(0 if share >= LEAST else 1)


def read(results: Path) -> dict[str, str]:
    """Return the last outcome of every mutant, by its key."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {fact["key"]: fact["outcome"] for fact in map(json.loads, lines)}


def report(chosen: list[tuple[str, Mutant]], known: dict[str, str], sources: dict[str, str], total: int) -> float:
    """Print the survivors and the share that was killed, by module and over all, which is returned."""
    counts: dict[str, collections.Counter[str]] = {module: collections.Counter() for module in sources}
    for key, mutant in sorted(chosen, key=lambda one: (one[1].file, one[1].start)):
        counts[mutant.file][known.get(key, "untried")] += 1
        if known.get(key) == "survived":
            print(f"survived: {mutant.words(sources[mutant.file])}")
            print(f"    {sources[mutant.file].splitlines()[mutant.line - 1].strip()}")
    counts["all"] = sum(counts.values(), collections.Counter())
    for module, count in counts.items():
        tried = count.total() - count["untried"]
        killed = tried - count["survived"]
        if tried:
            print(f"{module}: {killed} of {tried} killed, {killed / tried:.1%}; {count['untried']} untried")
    print(f"chosen: {len(chosen)} of {total} mutants")
    return killed / tried if tried else 0.0


if __name__ == "__main__":
    main()
