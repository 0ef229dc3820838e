"""What a run says of itself while it trains, once a cause."""

from run_folders import make_run

from mae import config
from mae.training.alarms import Alarms, told
from mae.training.run import RunFolder
from mae.training.tracking import Tracker


def test_an_alarm_is_told_once_a_cause_also_after_a_restart(tmp_path, caplog):
    run = RunFolder(make_run(tmp_path / "run"))
    quiet = {"data_wait": 0.1, "skipped_updates": 0, "loss_excess": 0.0, "replaced": 0, "loss": 1.0}
    loud = {"data_wait": 0.5, "skipped_updates": 2, "loss_excess": 30.0, "replaced": 1, "loss": 9.0}
    tracker = Tracker(config.load(["track.wandb=off"]), tmp_path, "pretrain", name="run", derived={})
    for began in (0, 1):
        alarms = Alarms(run, tracker, 0.0, goes_back=False)
        for step in range(3):
            alarms.look({"step": step, **quiet}, 30.0 * step)
        assert len(told(run.rows())) == 4 * began
        for step in range(3, 9):
            alarms.look({"step": step, **loud}, 30.0 * step)
    assert sorted(row["alarm"] for row in run.rows() if "alarm" in row) == ["damaged images", "data wait", "loss spike", "skipped updates"]
    assert caplog.text.count("ALARM") == 4
