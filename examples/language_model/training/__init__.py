"""The training itself: one step, the loop around it, and the devices and processes it runs on.

`optimizer` builds the optimizer and its schedule, `step` the train step, `evaluation` the
validation loss, and `loop` runs them from the first or a restored step to the last. `mesh` decides
how the state and the text are sharded, `processes` connects several processes, and `stop` turns a
signal into a request to save and end.
"""
