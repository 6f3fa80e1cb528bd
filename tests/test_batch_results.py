"""What runs have measured, as a table; the default run, made where it is missing."""

from effad_lib import batch, runs
from effad_lib.batch import as_text, notebook_parameters, results
from effad_lib.execution import last_step
from effad_lib.runs import Run


def test_the_table_shows_what_was_measured_and_a_dash_where_nothing_could_be(tmp_path):
    metrics = {"image_auroc": 0.98765, "image_ap": 1.0, "image_f1_max": 0.9, "pixel_auroc": None, "au_pro": None}
    Run(tmp_path / "cells").finish({"data": "elpv/mono", "seconds": 61.7, **metrics})
    Run(tmp_path / "teacher").finish({"loss": 0.2})
    table = results([tmp_path / "cells", tmp_path / "teacher", tmp_path / "absent"])
    assert len(table) == 1
    assert table.loc[0, "pixel_auroc"] is None and table.loc[0, "image_auroc"] == 0.98765
    header, line = as_text(table).splitlines()
    assert header.split("  ")[0].strip() == "data" and header.endswith("run folder")
    assert line.split() == ["elpv/mono", "0.988", "1.000", "0.900", "–", "–", "62", f"{tmp_path.resolve()}/cells"]


def test_only_the_default_run_is_made_and_only_what_is_missing_of_it(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(runs.files, "PROJECT", tmp_path)
    monkeypatch.setattr(batch, "load_dataset", lambda name, **_: name)
    monkeypatch.setattr(batch, "train", lambda settings, split: done.append((split, settings.steps, settings.device)))
    monkeypatch.setattr(batch, "evaluate_run", lambda folder, device: (None, None, folder))
    monkeypatch.setattr(batch, "finish_run", lambda folder, detector, found: done.append(found))
    batch.make_default_run("runs/mine", "cpu", evaluated=True)
    assert not done
    steps = notebook_parameters(batch.NOTEBOOKS / "03_training.ipynb")["steps"]
    batch.make_default_run("runs/training", "cpu", evaluated=True)
    assert done == [("synthetic", steps, "cpu"), "runs/training"]
    (tmp_path / "runs" / "training").mkdir(parents=True)
    (tmp_path / "runs" / "training" / "model.safetensors").touch()
    batch.make_default_run("runs/training", "cpu")
    assert len(done) == 2


def test_the_training_history_moves_the_bar(tmp_path):
    assert last_step(tmp_path / "history.csv") == 0
    (tmp_path / "history.csv").write_text("step,seconds\n100,2.0\n200,4.1\n")
    assert last_step(tmp_path / "history.csv") == 200
