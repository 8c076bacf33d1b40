"""One model on several devices one after the other, in one process: what none of them holds alone.

A stage is some of the layers on one device, with pages of its own (model/stage.py), run by the very
runner that would run the whole model there. `runner.py` passes the states of a step from stage to
stage; `start.py` places the layers by the room that there is (memory/pipeline.py) and loads them.
"""
