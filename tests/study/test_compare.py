from __future__ import annotations

import dataclasses
import html
import json

import numpy as np
import pytest

from fieldmark.errors import RunError
from fieldmark.study.compare import SHOWN, compare_runs, verdict


def _overrides(prob):
    return [f"mix.share={prob}"]


@pytest.mark.parametrize(
    ("runs", "end"), [(12, "About 11 more seeds each would"), (2000, "Many more seeds, and perhaps")]
)
def test_nobody_is_told_to_train_hundreds_of_seeds(make_run, runs, end):
    pair = compare_runs([make_run("a"), make_run("b", overrides=_overrides(0.4))]).pairs[0]
    pair = dataclasses.replace(pair, is_distinguishable=False, photos_needed=None, runs_needed=runs)
    words = verdict(pair, level=0.95, shown=SHOWN["top1"], num_comparisons=1)
    assert end in words
    assert words.endswith("be needed to see a difference of 1 point.")


def test_a_clear_difference_is_called_better_and_a_small_one_is_not(make_run):
    make_run("low", accuracy=0.5)
    make_run("high", accuracy=0.9, overrides=_overrides(0.4))
    make_run("higher", accuracy=0.91, overrides=_overrides(0.2))
    found = compare_runs([make_run.folder(name) for name in ("low", "high", "higher")])
    low_high, low_higher, high_higher = found.pairs
    assert low_high.is_distinguishable
    assert low_high.verdict.startswith("mix.share=0.4 is better than mix.share=0 by ")
    assert " ± " in low_high.verdict
    assert low_higher.is_distinguishable
    assert not high_higher.is_distinguishable
    assert high_higher.verdict.startswith("Not distinguishable: mix.share=0.2 over mix.share=0.4 is ")
    assert "more photos would be needed to see a difference of 1 point." in high_higher.verdict


def test_seeds_of_one_recipe_are_one_variant(make_run):
    runs = [make_run(f"{p}-{s}", seed=s, overrides=_overrides(p)) for p in (0.0, 0.4) for s in (0, 1, 2)]
    found = compare_runs(runs)
    assert [variant.name for variant in found.variants] == ["mix.share=0", "mix.share=0.4"]
    assert [variant.seeds for variant in found.variants] == [(0, 1, 2)] * 2
    assert len(found.pairs) == 1
    assert found.pairs[0].difference.num_runs == (3, 3)
    assert not any("one run only" in note for note in found.notes)


def test_one_run_each_is_said_to_leave_out_the_chance_of_training(make_run):
    found = compare_runs([make_run("a"), make_run("b", overrides=_overrides(0.4))])
    assert any(note.startswith("Every variant: one run only.") for note in found.notes)


def test_folds_are_joined_over_all_photos(make_run):
    def folds(name, prob, accuracy):
        return [
            make_run(
                f"{name}{fold}",
                accuracy=accuracy,
                overrides=["data.folds=2", f"data.fold={fold}", *_overrides(prob)],
                photos=[f"fold{fold}/{n}.jpg" for n in range(100)],
            )
            for fold in (0, 1)
        ]

    found = compare_runs([*folds("a", 0.0, 0.6), *folds("b", 0.4, 0.9)])
    assert found.num_photos == 200
    assert [len(variant.runs) for variant in found.variants] == [2, 2]
    assert [variant.scores.shape for variant in found.variants] == [(1, 200)] * 2


def test_the_order_of_photos_in_a_run_does_not_matter(make_run):
    names = [f"{n}.jpg" for n in range(100)]
    straight, other = make_run("a", photos=names), make_run("b", photos=names, overrides=_overrides(0.4), accuracy=0.7)
    before = compare_runs([straight, other]).pairs[0].difference.interval.estimate
    from fieldmark.runs.folder import Run, write_predictions

    stored = Run(other).predictions("val")
    turned = np.random.default_rng(0).permutation(100)
    write_predictions(
        other / "predictions" / "val.parquet",
        paths=[stored.paths[n] for n in turned],
        labels=stored.labels[turned],
        probabilities=stored.probabilities[turned],
        classes=Run(other).classes,
    )
    (other / "predictions" / "val_epochs.npz").unlink()
    assert compare_runs([straight, other]).pairs[0].difference.interval.estimate == before


def test_runs_on_different_photos_are_refused(make_run):
    first = make_run("first")
    second = make_run("second", photos=[f"elsewhere/{n}.jpg" for n in range(100)], overrides=_overrides(0.4))
    with pytest.raises(RunError, match=r"scored on different photos \(100 and 100, 0 in common.*data\.split_seed"):
        compare_runs([first, second])


def test_runs_with_other_classes_are_refused(make_run):
    first, second = make_run("first"), make_run("second", classes=("auk", "bee-eater"), seed=1)
    with pytest.raises(RunError, match=r"different classes \(4 and 2\)"):
        compare_runs([first, second])


def test_runs_with_other_labels_are_refused(make_run):
    names = [f"{n:03d}.jpg" for n in range(100)]
    first = make_run("first", photos=names)
    second = make_run("second", photos=names[1:] + names[:1], overrides=_overrides(0.4))
    with pytest.raises(RunError, match=r"disagree on the label of '000\.jpg'"):
        compare_runs([first, second])


def test_the_same_recipe_and_seed_twice_is_refused(make_run):
    with pytest.raises(RunError, match="same settings, seed and fold"):
        compare_runs([make_run("first"), make_run("again")])
    with pytest.raises(RunError, match="same settings, seed and fold"):
        compare_runs([make_run("here"), make_run("there", photos=[f"{n}.jpg" for n in range(100)])])


def test_an_unfinished_run_is_refused_when_named_and_passed_over_in_a_folder(make_run, tmp_path):
    done, torn = make_run("sweep/done"), make_run("sweep/torn", status="interrupted", overrides=_overrides(0.4))
    with pytest.raises(RunError, match=r"not finished \(its status is 'interrupted'\)"):
        compare_runs([done, torn])
    assert [s.name for s in compare_runs([tmp_path / "sweep"]).variants] == ["done"]


@pytest.mark.parametrize(("name", "problem"), [("nowhere", "does not exist"), ("empty", "holds no finished run")])
def test_a_path_without_runs_is_named(tmp_path, name, problem):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=f"{name} {problem}"):
        compare_runs([tmp_path / name])


def test_a_run_without_stored_predictions_is_named(make_run):
    with pytest.raises(RunError, match="no predictions of 'test'"):
        compare_runs([make_run("a")], split="test")


def test_predictions_of_epochs_that_fit_no_photos_are_named(make_run):
    run = make_run("a")
    np.savez(run / "predictions" / "val_epochs.npz", predicted=np.zeros((3, 7), int))
    with pytest.raises(RunError, match=r"shape \(3, 7\), not of 100 photos"):
        compare_runs([run])


def test_an_unknown_metric_and_a_wild_level_are_refused(make_run):
    run = make_run("a")
    with pytest.raises(RunError, match=r"no metric 'f1'.*macro_recall"):
        compare_runs([run], metric="f1")
    with pytest.raises(RunError, match="between 0 and 1; got 95"):
        compare_runs([run], level=95)


@pytest.mark.parametrize("metric", ["top1", "macro_recall", "prior_top1", "log_loss"])
def test_the_mean_of_the_scores_is_the_metric(make_run, metric):
    from fieldmark.runs.folder import Run
    from fieldmark.training import metrics

    run = Run(make_run("a", per_class=13))
    stored = run.predictions("val")
    expected = {
        "top1": metrics.top_k(stored.probabilities, stored.labels, k=1),
        "macro_recall": metrics.macro_recall(stored.probabilities, stored.labels),
        "prior_top1": metrics.prior_top1(stored.probabilities, stored.labels, run.prior),
        "log_loss": -metrics.log_loss(stored.probabilities, stored.labels),
    }[metric]
    interval = compare_runs([run.path], metric=metric).variants[0].interval
    assert interval.estimate == pytest.approx(expected)
    assert interval.low < interval.estimate < interval.high


def test_choosing_the_best_epoch_is_said_to_bias_accuracy_and_the_last_is_not(make_run):
    best = compare_runs([make_run("best", epochs=12)])
    assert best.variants[0].optimism > 0
    assert any("optimistic bias of about" in note for note in best.notes)
    unknown = compare_runs([make_run("unknown", epochs=12, keep_epochs=False)])
    assert unknown.variants[0].optimism is None
    last = compare_runs([make_run("last", epochs=12, overrides=['train.select="last"'])])
    assert last.variants[0].optimism is None
    assert last.as_dict()["variants"][0]["optimism"] == {"points": 0.0, "source": "none"}
    assert not any("optimistic bias" in note for note in last.notes)


def test_the_same_seed_gives_the_same_comparison_as_json(make_run):
    runs = [make_run("a"), make_run("b", overrides=_overrides(0.4))]
    first, second = (json.dumps(compare_runs(runs).as_dict()) for _ in range(2))
    assert first == second
    assert json.loads(first)["pairs"][0]["verdict"]


def test_a_single_variant_has_nothing_to_compare_with(make_run):
    found = compare_runs([make_run("a", seed=0), make_run("b", seed=1)])
    assert found.pairs == ()
    assert any("one variant only" in note for note in found.notes)


def test_a_baseline_is_compared_with_each_and_corrects_for_no_other_pair(make_run):
    make_run("plain", accuracy=0.7, overrides=_overrides(0.0))
    for prob, accuracy in ((0.2, 0.8), (0.4, 0.72)):
        make_run(f"at-{prob}", accuracy=accuracy, overrides=[*_overrides(prob), f"optim.lr={prob}"])
    folders = [make_run.folder(name) for name in ("at-0.2", "at-0.4", "plain")]
    every, found = compare_runs(folders), compare_runs(folders, against=folders[2])
    assert [variant.name for variant in found.variants] == [
        "plain",
        "mix.share=0.2 optim.lr=0.2",
        "mix.share=0.4 optim.lr=0.4",
    ]
    assert [pair.first for pair in found.pairs] == ["plain", "plain"]
    assert (every.baseline, found.baseline) == (None, "plain")
    by_estimate = {round(-p.difference.interval.estimate, 6): p for p in every.pairs if "share=0 " in p.second}
    for pair in found.pairs:
        same = by_estimate[round(pair.difference.interval.estimate, 6)]
        assert same.difference.p_value == pair.difference.p_value
        assert pair.corrected_p <= same.corrected_p


def test_a_variant_is_named_by_what_it_changes_of_the_baseline_alone(make_run):
    make_run("plain")
    make_run("mixed", overrides=_overrides(0.2))
    make_run("slow", overrides=["optim.lr=0.5"])
    found = compare_runs(
        [make_run.folder(name) for name in ("plain", "mixed", "slow")], against=make_run.folder("plain")
    )
    assert [variant.name for variant in found.variants] == ["plain", "mix.share=0.2", "optim.lr=0.5"]


def test_a_baseline_that_is_not_among_the_runs_is_named(make_run, tmp_path):
    with pytest.raises(RunError, match="elsewhere is not among the runs that are compared"):
        compare_runs([make_run("a"), make_run("b", overrides=_overrides(0.4))], against=tmp_path / "elsewhere")


MANY = ["mix.share=0.2", "optim.lr=0.5", "augment.erase=0.1", "train.ema_decay=0.5", "model.head=mlp",
        "probe.epochs=3", "train.label_smoothing=0.1"]  # fmt: skip


def test_variants_that_differ_in_too_much_to_read_are_named_by_their_folders(make_run):
    plain, other = make_run("plain"), make_run("other", overrides=MANY)
    assert [variant.name for variant in compare_runs([plain, other]).variants] == ["plain", "other"]
    assert [variant.name for variant in compare_runs([plain, other], against=other).variants] == ["other", "plain"]


def test_runs_of_several_seeds_are_named_by_the_folder_that_holds_them(make_run):
    runs = [
        make_run(f"{n}/{s}", seed=s, overrides=more) for n, more in (("plain", []), ("other", MANY)) for s in (0, 1)
    ]
    assert [variant.name for variant in compare_runs(runs).variants] == ["plain", "other"]


def test_folders_named_alike_leave_the_changes_as_names(make_run):
    runs = [make_run("a/run"), make_run("b/run", overrides=MANY)]
    assert all("optim.lr=" in variant.name for variant in compare_runs(runs).variants)


def test_an_accuracy_of_few_seeds_stays_between_none_and_all(make_run):
    runs = [make_run("poor", accuracy=0.3), make_run("good", seed=1, accuracy=0.9)]
    interval = compare_runs(runs).variants[0].interval
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize("metric", ["top1", "macro_recall", "prior_top1"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_nine_photos_without_an_error_are_no_proof_of_perfection(make_run, metric, seeds):
    runs = [make_run(f"{s}", seed=s, accuracy=2.0, classes=("auk", "crane", "dipper"), per_class=3) for s in seeds]
    found = compare_runs(runs, metric=metric)
    interval = found.variants[0].interval
    assert (interval.estimate, interval.high) == (pytest.approx(1), pytest.approx(1))
    # Wilson's for 9 of 9: by hand, 9 / (9 + 1.96²)
    assert interval.low == pytest.approx(0.701, abs=0.001) if metric != "prior_top1" else interval.low < 0.701
    assert any(note.startswith("Only 9 photos") for note in found.notes)


def test_equal_log_losses_keep_an_open_interval(make_run):
    runs = [make_run(f"{s}", seed=s, accuracy=2.0) for s in (0, 1)]
    interval = compare_runs(runs, metric="log_loss").variants[0].interval
    assert interval.low < interval.estimate < interval.high <= 0


def test_several_seeds_are_not_surer_than_one_of_a_few_photos(make_run):
    """Four photos of nine improve in both seeds: the sign test says 2/16, whatever the number of seeds."""
    folder = make_run.folder("")
    for seed in (0, 1):
        for prob, right in ((0.0, 5), (0.4, 9)):
            run = make_run(f"{prob}-{seed}", seed=seed, overrides=_overrides(prob), per_class=9, classes=("a", "b"))
            _rewrite(run, right)
    (pair,) = compare_runs([folder]).pairs
    assert pair.difference.p_value == pytest.approx(2 / 16, abs=0.03)
    assert not pair.is_distinguishable


def _rewrite(run, right):
    from fieldmark.runs.folder import write_predictions

    labels = np.zeros(9, np.int64)
    own = (np.arange(9) < right).astype(np.float32)
    write_predictions(
        run / "predictions" / "val.parquet",
        paths=[f"{n}.jpg" for n in range(9)],
        labels=labels,
        probabilities=np.stack([own, 1 - own], axis=1),
        classes=("a", "b"),
    )
    (run / "predictions" / "val_epochs.npz").unlink()


def test_a_probe_that_beats_its_fine_tuning_is_said(make_run):
    run = make_run("a")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    probe = rows[0] | {"epoch": 0, "is_probe": True, "val": rows[0]["val"] | {"top1": 0.97}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [probe, *rows]))
    (note,) = [note for note in compare_runs([run]).notes if "probe" in note]
    assert note.startswith("a: the probe (the head alone, before fine-tuning) reached top1 0.970, and no epoch")
    probe["val"]["top1"] = 0.1
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [probe, *rows]))
    assert not any("probe" in note for note in compare_runs([run]).notes)


def test_a_comparison_is_a_table_with_its_verdicts_in_a_terminal_and_in_a_notebook(make_run):
    found = compare_runs([make_run("a"), make_run("b", overrides=_overrides(0.4), accuracy=0.5)])
    for text in (repr(found), found._repr_html_()):
        assert all(variant.name in text for variant in found.variants)
        assert html.escape(found.pairs[0].verdict, quote=False) in text
    assert f"{found.variants[0].interval.low:.3f} to" in repr(found)
    assert found.shown.interval(found.variants[0].interval) in found._repr_html_()
