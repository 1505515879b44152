"""The control-plane: the only user of pyvmomi, logging in included. It finds and describes; it moves no disk byte."""
