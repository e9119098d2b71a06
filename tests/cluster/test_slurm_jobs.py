"""Jobs of launch/slurm.sh from their start to their end."""

import json

import pytest

from tests.cluster.runs import HELD, STEPS, describe, hold, let_go, settings, submit, until, until_held


@pytest.mark.parametrize(("launcher", "stage"), [("srun", 2), ("srun", 3), ("deepspeed", 2), ("deepspeed", 3)])
def test_the_demos_settings_train_to_their_end(slurm, shards, tmp_path, launcher, stage):
    """On two nodes with two tasks each, and a folder with an odd name."""
    folder = tmp_path / "it's 100% # mine"
    job = submit(
        slurm, folder, *settings(shards, stage), LAUNCHER=launcher, GPUS_PER_NODE="2", TRAIN_BATCH_SIZE_PER_GPU="1",
        PREFLIGHT=str(int(stage == 2)), WANDB_API_KEY="secret",
    )  # fmt: skip
    fields = slurm.wait(job, "COMPLETED")
    assert fields["ExitCode"] == "0:0" and fields["Restarts"] == "0" and fields["NumNodes"] == "2"
    output = (folder / f"slurm/job_{job}.txt").read_text()
    assert f"4 x cpu, ZeRO-{stage}, batch 8 = 1 x 4 x 2 accumulated" in output and (folder / "model.safetensors").is_file()
    assert ("over 4 processes" in output) == (stage == 2)
    assert sorted(path.name for path in (folder / "ranks").iterdir()) == [f"rank_{rank}.txt" for rank in range(4)]
    assert f"step {STEPS}/{STEPS}" in (folder / "ranks/rank_0.txt").read_text()
    saved = folder / f"slurm/job_{job}"
    assert "#SBATCH --requeue" in saved.with_suffix(".sh").read_text()
    assert len(saved.with_suffix(".git.txt").read_text().split()[0]) >= 40
    environment = saved.with_suffix(".environment.txt").read_text()
    assert f"LAUNCHER={launcher}" in environment and "secret" not in environment


def test_a_node_that_is_not_fit_is_left_out(slurm, shards, tmp_path):
    (tmp_path / "broken_node").write_text("n0")
    job = submit(slurm, tmp_path, *settings(shards, 2), PREFLIGHT="1")
    fields = slurm.wait(job, "COMPLETED")
    output = describe(tmp_path)
    assert fields["Restarts"] == "1" and fields["ExcNodeList"] == "n0" and fields["NodeList"] == "n[1-2]"
    assert "error: n0: gave no answer" in output and "not fit: n0" in output and "a broken node" in output, output


def test_a_node_that_is_not_fit_but_needed_does_not_keep_the_job_waiting(slurm, shards, tmp_path):
    (tmp_path / "broken_node").write_text("n0")
    job = submit(
        slurm, tmp_path, *settings(shards, 2, "global_batch_size=12"), PREFLIGHT="1", NUM_NODES="3", MAX_RESTARTS="1"
    )
    fields = slurm.wait(job, "FAILED")
    output = describe(tmp_path)
    assert fields["Restarts"] == "1" and "only 2 other nodes" in output, output
    assert "1 restarts brought it no farther than step 0" in output


def test_a_task_of_an_array_is_requeued_alone_and_beside_others(slurm, shards, tmp_path):
    """Two jobs at the same time on the same two nodes."""
    for task in (0, 1):
        hold(tmp_path / str(task))
    array = submit(slurm, tmp_path, *settings(shards, 2), "seed=%a", "--", "--array=0-1")
    for task in (0, 1):
        until_held(tmp_path / str(task))
    assert [fields["NodeList"] for fields in slurm.jobs(array)] == ["n[0-1]"] * 2
    slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    until((tmp_path / "1/stop").exists, "the signal was not heard")
    let_go(tmp_path / "1")
    slurm.wait(f"{array}_1", "COMPLETED")
    assert slurm.state(f"{array}_0") == "RUNNING" and slurm.restarts(f"{array}_0") == 0 and slurm.restarts(f"{array}_1") == 1
    let_go(tmp_path / "0")
    slurm.wait(f"{array}_0", "COMPLETED")
    for task in (0, 1):
        assert f"seed: {task}\n" in (tmp_path / f"{task}/config.yaml").read_text()
    assert f"resumed at step {HELD + 1}" in (tmp_path / "1/log.txt").read_text()


def test_wandb_goes_on_in_the_same_run(slurm, shards, tmp_path):
    hold(tmp_path)
    job = submit(slurm, tmp_path, *settings(shards, 2), "wandb.mode=offline")
    until_held(tmp_path)
    first = (tmp_path / "wandb_run_id").read_text()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    until((tmp_path / "stop").exists, "the signal was not heard")
    let_go(tmp_path)
    slurm.wait(job, "COMPLETED")
    assert (tmp_path / "wandb_run_id").read_text() == first
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(first) for name in runs), runs
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(STEPS))


def test_a_stop_file_ends_a_job_that_waits_for_its_restart(slurm, shards, tmp_path):
    hold(tmp_path)
    job = submit(slurm, tmp_path, *settings(shards, 2))
    until_held(tmp_path)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    until((tmp_path / "stop").exists, "the signal was not heard")
    let_go(tmp_path)
    slurm.wait(job, "PENDING")
    (tmp_path / "stop").touch()
    fields = slurm.wait(job, "FAILED")
    assert fields["ExitCode"] == "75:0" and fields["Restarts"] == "1" and "stop is there: ends" in describe(tmp_path)
    assert "resumed" not in (tmp_path / "log.txt").read_text()


def test_a_job_is_not_taken_for_the_one_that_it_was_submitted_from(slurm, shards, tmp_path):
    outer = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "9"}
    outer |= {"SLURM_CPU_BIND": "nonsense", "SLURM_NTASKS": "5", "HOSTFILE": "/nowhere", "MASTER_ADDR": "192.0.2.1", "limit": "1"}
    job = submit(slurm, tmp_path, *settings(shards, 2), **outer)
    slurm.wait(job, "COMPLETED")
    assert f"job {job}, start 0: ended with exit code 0" in describe(tmp_path) and (tmp_path / "model.safetensors").is_file()


def test_slurm_is_asked_before_a_job_is_submitted(slurm, shards, tmp_path):
    with pytest.raises(AssertionError, match="Slurm would not take the job"):
        submit(slurm, tmp_path, *settings(shards, 2), PARTITION="nowhere")
    assert not slurm.run("squeue", "-h").stdout
