"""Tests of the client and the command line, against real gRPC servers on real sockets."""
