#!/bin/sh
echo "@GREETING@, on $(uname -m)"
