"""The rules of the balancers, for every method and every wrapper of the registry."""

import pytest
from registry import CASES, WRAPPED
from rules.checks import RULES, Rule
from rules.faults import FEW, batches, run_matrix
from rules.subjects import SUBJECTS, Subject

import mtljax
from mtljax.catalogue import WRAPPERS

pytestmark = pytest.mark.usefixtures("as_users")


# Of the balancers made of common methods, those of the normal suite.
WRAPPERS_BY_DEFAULT = {
    "compose(scale_invariant,mgda)",
    "smooth_weights(nash_mtl)",
    "inject_hyperparams(cagrad,c=falling)",
}


def is_common(subject: Subject) -> bool:
    """Whether the normal suite has it; all others run in deep."""
    return subject.classic and (
        subject.id in WRAPPERS_BY_DEFAULT or "(" not in subject.id
    )


def table():
    """All pairs; the programs of a balancer are compiled on one worker."""
    for subject in SUBJECTS:
        for rule in RULES:
            marks = [pytest.mark.xdist_group(subject.id)]
            marks += [pytest.mark.deep] * (not is_common(subject))
            if rule.name != "policy":  # test_faults has a test of its own
                yield pytest.param(
                    subject, rule, id=f"{subject.id}-{rule.name}", marks=marks
                )


@pytest.mark.parametrize(("subject", "rule"), list(table()))
def test_rule(subject: Subject, rule: Rule):
    broken = [f"{what}: {why}" for what, why in rule.check(subject) if why is not None]
    assert not broken, "\n".join(broken)


def each():
    """All balancers; the normal suite has the most common ones."""
    for subject in SUBJECTS:
        marks = [pytest.mark.xdist_group(subject.id)]
        marks += [pytest.mark.deep] * (not is_common(subject))
        yield pytest.param(subject, id=subject.id, marks=marks)


@pytest.mark.parametrize("subject", list(each()))
def test_fault_matrix(subject: Subject, record_property):
    report = run_matrix(subject)
    record_property("fault_cases", report.cases)
    record_property("fault_violations", len(report.violations))
    assert report.cases == len(batches(3))
    assert not report.violations, "\n".join(report.violations)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("tasks", "dtype"),
    [(3, "float16"), (3, "bfloat16"), (1, "float32"), (200, "float32")],
)
@pytest.mark.parametrize("subject", list(each()))
def test_fault_matrix_of_other_shapes_and_dtypes(
    subject: Subject, tasks, dtype, record_property
):
    report = run_matrix(subject, tasks, dtype, few=True)
    record_property("fault_cases", report.cases)
    record_property("fault_violations", len(report.violations))
    assert not report.violations, "\n".join(report.violations)


def test_the_matrix_is_as_large_as_it_says():
    names = [batch.name for batch in batches(3)]
    assert len(set(names)) == len(names) >= 60
    assert len(SUBJECTS) * len(names) >= 4200
    assert sum(name.startswith(FEW) for name in names) >= 12


def test_every_method_and_wrapper_is_a_subject():
    assert {case.name for case in CASES} == set(mtljax.METHODS)
    assert {case.factory.__name__ for case in WRAPPED} == set(WRAPPERS)
    assert len({subject.id for subject in SUBJECTS}) == len(SUBJECTS)
