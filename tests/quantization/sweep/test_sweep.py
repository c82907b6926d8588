"""The engine: what decides a key, what is measured once, what fails alone, the same report after interruptions."""

import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import sweep_fakes as fakes

from fastvlm.common import staging, threads
from fastvlm.common.errors import CheckFailed, UserError
from quantization.sweep import cluster as sweep_cluster
from quantization.sweep import engine, point
from quantization.sweep import report as sweep_report
from quantization.sweep.recommend import Constraints

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Dask's workers find the fakes, whose scheduler has time to answer; what a sweep sets is set back."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")
    monkeypatch.setattr(sweep_cluster, "ANSWER", 100)
    for name in threads.environment(1):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def points():
    return engine.grid(fakes.RECIPES[:2], fakes.FORMS, fakes.RESOLUTIONS)


def report(points, outcome):
    """The report without its timings, as JSON."""
    document = sweep_report.document(points, outcome, {}, {}, Constraints())
    return json.loads(json.dumps({name: value for name, value in document.items() if name != "timings"}))


# The grid


def test_the_grid_is_every_combination(points):
    assert len(points) == len({point["name"] for point in points}) == 8
    assert points[0]["name"] == "fp16 fp16 128" and points[0]["recipe"]["rules"]


def test_every_fault_of_the_grid_is_named_at_once(tmp_path):
    twin = tmp_path / "twin.json"
    twin.write_text(json.dumps(engine.load_recipe("int4").to_json()))
    with pytest.raises(UserError) as caught:
        engine.grid(["int4", "int4x", str(twin), "int4"], ["fp16"], [64, 64])
    for part in ("int4x", "--quant int4: given twice", "2 recipes have the name int4", "64: given twice"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Keys


def changed_recipe(point):
    recipe = json.loads(json.dumps(point["recipe"]))
    recipe["rules"][0]["pattern"] = "other*"
    return {**point, "recipe": recipe}


@pytest.mark.parametrize(
    "change",
    [
        lambda s, i, p: (s, i, changed_recipe(p)),
        lambda s, i, p: (s, i, {**p, "vision_quant": "int8"}),
        lambda s, i, p: (s, i, {**p, "resolution": 192}),
        lambda s, i, p: (replace(s, inputs={"samples": "other"}), i, p),
        lambda s, i, p: (replace(s, measure=fakes.unwell), i, p),
        lambda s, i, p: (s, {"sources": "other"}, p),
    ],
)
def test_whatever_determines_a_result_is_in_its_key(tmp_path, points, change):
    one = fakes.sweep_of(tmp_path, inputs={"samples": "these"})
    before = engine.key(one, fakes.identity(), points[0])
    assert engine.key(*change(one, fakes.identity(), points[0])) != before


def test_names_and_places_are_not_in_the_key(tmp_path, points):
    here, there = fakes.sweep_of(tmp_path / "a"), fakes.sweep_of(tmp_path / "b", sleep=1)
    same = {**points[0], "name": "another"}
    assert engine.key(here, fakes.identity(), points[0]) == engine.key(there, fakes.identity(), same)


def test_the_code_is_hashed(tmp_path, monkeypatch):
    (tmp_path / "fastvlm").mkdir()
    monkeypatch.setattr(engine, "ROOT", tmp_path)
    digests = [engine.sources_sha256()]
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.json", "2"), ("c.txt", "2")):
        (tmp_path / "fastvlm" / name).write_text(content)
        digests.append(engine.sources_sha256())
    assert len(set(digests)) == 4 and digests[3] == digests[4]


# Running


def test_a_repeated_sweep_is_free_and_a_larger_one_measures_only_what_is_new(tmp_path, points):
    one = fakes.sweep_of(tmp_path)
    first = engine.run(one, points[:3], jobs=2)
    assert (first.reused, len(first.results), first.errors) == (0, 3, {})
    assert len({result["timings"]["process"] for result in first.results.values()} - {os.getpid()}) == 3
    assert min(result["timings"]["peak_bytes"] for result in first.results.values()) > 1e6
    again = engine.run(one, points[:5], jobs=2)
    assert (again.reused, len(again.results)) == (3, 5)
    assert set(fakes.runs(tmp_path).values()) == {1} and len(fakes.runs(tmp_path)) == 5
    assert engine.run(replace(one, inputs={"samples": "others"}), points[:1]).reused == 0  # negative control


def test_a_function_called_apart_says_how_it_ended():
    assert point.apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="nowhere"):
        point.apart(engine.load_recipe, "nowhere.json")
    with pytest.raises(CheckFailed, match="_exit: its process was killed"):
        point.apart(os._exit, 9)


def test_a_damaged_result_is_measured_again(tmp_path, points):
    one = fakes.sweep_of(tmp_path)
    before = engine.run(one, points[:2], jobs=2)
    paths = sorted((tmp_path / "points").iterdir())
    paths[0].write_text(paths[0].read_text()[:-20])
    paths[1].write_text(paths[1].read_text().replace('"key": "', '"key": "0'))
    after = engine.run(one, points[:2], jobs=2)
    assert after.reused == 0 and report(points, after)["points"] == report(points, before)["points"]


def test_a_failing_point_is_named_and_the_rest_goes_on(tmp_path):
    points = engine.grid(["fp16", "int8"], fakes.FORMS, fakes.RESOLUTIONS)
    outcome = engine.run(fakes.sweep_of(tmp_path, fakes.unwell), points, jobs=2)
    assert [result["figures"]["answer_kl_mean"] for result in outcome.results.values()] == [None] * 4  # not finite
    assert outcome.errors["int8 fp16 128"] == "two; lines"
    assert "its process was killed" in outcome.errors["int8 fp16 256"]
    assert "its process was killed" in outcome.errors["int8 int8 128"]
    assert outcome.errors["int8 int8 256"] == "division by zero"
    assert [row["name"] for row in report(points, outcome)["failed"]] == sorted(outcome.errors)
    logs = sorted(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert len(logs) == 4 and any("noise on stdout" in text and "Traceback" in text for text in logs)
    again = engine.run(fakes.sweep_of(tmp_path, fakes.unwell), points, jobs=2)
    assert again.reused == 4 and len(again.errors) == 4, "failures are tried again"


def test_a_full_disk_stops_the_sweep(tmp_path, points):
    with pytest.raises(UserError, match=r"^No space left on device: /somewhere: free some.*0 finished points"):
        engine.run(fakes.sweep_of(tmp_path, fakes.no_space), points, jobs=1)


@pytest.mark.parametrize(("jobs", "memory", "need", "most"), [(3, None, 1, 3), (3, 10, 4, 2), (3, 10, 40, 1)])
def test_points_run_together_as_far_as_memory_allows(tmp_path, points, jobs, memory, need, most, capsys):
    crowd = tmp_path / "crowd"
    crowd.mkdir()
    one = fakes.sweep_of(tmp_path / "work", fakes.crowd, crowd=str(crowd), should=most)
    outcome = engine.run(replace(one, need=lambda point: need), points[:4], jobs=jobs, memory=memory)
    assert len(outcome.results) == 4
    assert max(result["timings"]["crowd"] for result in outcome.results.values()) == most
    assert {r["timings"]["threads"] for r in outcome.results.values()} == {str(max(1, threads.cores() // jobs))}
    assert ("will run alone" in capsys.readouterr().err) == (need > (memory or need))


def test_a_second_sweep_on_the_folder_is_refused(tmp_path, points):
    with staging.held(tmp_path, ""), pytest.raises(UserError, match="another sweep runs there"):
        engine.run(fakes.sweep_of(tmp_path), points)
    assert len(engine.run(fakes.sweep_of(tmp_path), points[:1]).results) == 1, "the lock is gone with its holder"


# Interruptions


def program(work, target, *arguments):
    code = "import sweep_fakes, sys; sweep_fakes.main(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, (work, target, *arguments))], stderr=subprocess.PIPE, text=True,
        # A shell that starts the tests in the background has SIGINT ignored, which a child inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def alive(process):
    """A zombie is dead, too: not every container has somebody to bury it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The points of the whole grid, and the report of a sweep over them that nobody interrupts."""
    points = engine.grid(fakes.RECIPES, fakes.FORMS, fakes.RESOLUTIONS)
    return points, report(points, engine.run(fakes.sweep_of(tmp_path_factory.mktemp("whole")), points, jobs=2))


def test_killed_at_random_moments_the_report_is_the_same(tmp_path, uninterrupted):
    rng, work, target = random.Random(5), tmp_path / "work", tmp_path / "report.json"
    points, whole = uninterrupted
    for kill in range(3):
        before = fakes.finished(work)
        process = program(work, target, 2, before + 3)
        until(lambda process=process, before=before: fakes.finished(work) > before or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.2))
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 1 + 1, "what they are forked from, and points"
        process.kill()
        process.communicate()
        until(lambda below=below: not any(map(alive, below)), 60)
        assert not target.exists() and fakes.finished(work) > before, kill
    (work / "points" / ".point.json.1.partial").touch()  # as of a kill in the middle of a write
    assert engine.run(fakes.sweep_of(work), points, jobs=3).reused >= 3
    assert report(points, engine.run(fakes.sweep_of(work), points)) == whole and len(whole["points"]) == 16
    assert max(fakes.runs(work).values()) <= 1 + 3, "a point runs again only when it was killed"
    assert sum(fakes.runs(work).values()) <= 16 + 3 * 2
    assert not list(work.rglob("*.partial"))


def test_ctrl_c_ends_the_children_and_keeps_what_is_finished(tmp_path):
    work = tmp_path / "work"
    process = program(work, tmp_path / "report.json", 2, 3)
    until(lambda: fakes.finished(work) >= 2)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    until(lambda: not any(map(alive, below)), 60)
    assert 2 <= fakes.finished(work) < 16
    assert sum(fakes.runs(work).values()) <= fakes.finished(work) + 2


def test_ctrl_c_while_the_libraries_are_imported(tmp_path):
    """Ctrl-C of a terminal goes to what imports them as well."""
    (tmp_path / "slow_library.py").write_text("import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(99)\n")
    code = """if True:
        import argparse
        from dataclasses import replace
        from pathlib import Path
        import sweep_fakes
        from fastvlm.common import cli
        from quantization.sweep import engine
        sweep = replace(sweep_fakes.sweep_of(Path("work")), libraries=("slow_library",))
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda args: vars(engine.run(sweep, engine.grid(["fp16"], ["fp16"], [128, 256]), 2)))
        cli.main(lambda: parser)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, tmp_path)))},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until((tmp_path / "here").exists)
    os.killpg(process.pid, signal.SIGINT)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130 and [line for line in lines if "sweep (points)" not in line] == ["interrupted"]


# A cluster


@pytest.fixture(scope="module")
def workers():
    """Two Dask workers on this machine, each a process."""
    distributed = pytest.importorskip("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster:
            yield cluster


def test_workers_with_other_code_are_refused(tmp_path, workers, points, monkeypatch):
    monkeypatch.setenv("SWEEP_FAKES", "changed")
    with pytest.raises(UserError, match=r"has other sources than here.*has other sources than here"):
        engine.run(fakes.sweep_of(tmp_path), points, scheduler=workers.scheduler_address)


def test_a_connection_that_breaks_while_a_result_is_fetched(tmp_path, workers, monkeypatch):
    import distributed.comm
    import distributed.core

    send_recv, broken, shown = distributed.core.send_recv, [], logging.StreamHandler(io.StringIO())

    async def breaking(comm, *, op, **kwargs):
        if op == "gather" and not broken:
            broken.append(op)
            raise distributed.comm.CommClosedError("Connection reset by peer")
        return await send_recv(comm=comm, op=op, **kwargs)

    monkeypatch.setattr(distributed.core, "send_recv", breaking)
    logging.getLogger("tornado.application").addHandler(shown)
    with sweep_cluster.cluster(workers.scheduler_address, tmp_path, fakes.identity) as (pool, _):
        assert pool.submit(fakes.identity).result(timeout=120) == fakes.identity()
    logging.getLogger("tornado.application").removeHandler(shown)
    assert broken and not shown.stream.getvalue()


def test_no_scheduler_is_one_line(tmp_path, points, monkeypatch):
    monkeypatch.setattr(sweep_cluster, "ANSWER", 1)
    with pytest.raises(UserError, match=r"--scheduler tcp://127\.0\.0\.1:9: no Dask scheduler answers there") as caught:
        engine.run(fakes.sweep_of(tmp_path), points, scheduler="tcp://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_two_workers_give_the_report_of_one_process_and_what_is_finished_stays_when_they_go_away(
    tmp_path, workers, uninterrupted
):
    points, whole = uninterrupted
    outcome = engine.run(fakes.sweep_of(tmp_path / "whole"), points, scheduler=workers.scheduler_address)
    assert report(points, outcome) == whole and sum(fakes.runs(tmp_path / "whole").values()) == 16
    work = tmp_path / "work"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.run, fakes.sweep_of(work, most=4), points, scheduler=workers.scheduler_address)
        until(lambda: fakes.finished(work) >= 2)
        workers.close()
        error = running.exception(timeout=300)
    assert isinstance(error, UserError) and "went away: finished points are kept in" in str(error)
    assert engine.run(fakes.sweep_of(work), points, jobs=2).reused >= 2
