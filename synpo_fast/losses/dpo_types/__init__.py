"""DPO's other loss types: losses of the log-ratios of two responses to a reference, each in a function of its own."""
