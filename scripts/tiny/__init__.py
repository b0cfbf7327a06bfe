"""A small LTX made from nothing: the world it is trained on, and what judges its clips."""
