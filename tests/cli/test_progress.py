"""Progress in words."""

from gradleak.cli.progress import describe


def test_describe() -> None:
    assert describe(0, total=80, resumed=0, seconds=0) == "0 of 80 trials"
    assert describe(20.5, total=80, resumed=0, seconds=41) == "20 of 80 trials, 0.5/s, 1:59 left"
    assert describe(30, total=80, resumed=30, seconds=9) == "30 of 80 trials (30 kept)"
    assert describe(40, total=80, resumed=30, seconds=5) == (
        "40 of 80 trials (30 kept), 2/s, 0:20 left"
    )
