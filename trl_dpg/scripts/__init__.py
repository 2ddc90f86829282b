"""The commands of `trl-dpg`. Training can also be started without it: `accelerate launch -m trl_dpg.scripts.train ...`."""
