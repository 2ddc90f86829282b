"""What the command line runs. Each script can also be started by itself: `accelerate launch -m trl_dpg.scripts.dpg ...`."""
