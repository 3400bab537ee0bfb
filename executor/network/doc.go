//go:build linux

// Package network makes the network namespaces that processes run in.
//
// A Provider hands out namespaces of one kind: with loopback only (none),
// connected to a bridge of its own (bridge), or set up by CNI plugins (cni). The
// machine's own network needs no provider: such a process has no namespace.
//
// Making a namespace takes the kernel longer than everything else that a step
// is set up with, so each provider keeps some ready, and as many as were in use at
// once of late. One that was used is handed out again only if nothing was sent in
// it and no socket is left; all others are unmade in the background, many at once.
//
// Where the network has room for no more, a process waits for another's to come
// back, but not for those of frontends and the like, which end only after others.
//
// A namespace of none and bridge lives by an open file, so it ends with the
// daemon, however that ends; what remains after a crash are the bridge and its
// rules, and with CNI what the plugins made. A file in the directory of the
// networks tells of both until they are removed. Open removes what is left of
// executors none of which lives, whatever the mode is now.
//
// Nothing here changes addresses, rules or links that it didn't make, except
// that forwarding of packets is turned on for bridge, and stays on.
package network
