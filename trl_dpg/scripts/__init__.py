"""What the command line runs. Training can also be started by itself: `accelerate launch -m trl_dpg.scripts.train ...`."""
