// Package rootless lets a program of an ordinary user have a user namespace in
// which it is root, and knows what holds in one.
//
// Enter executes the program again as root of a user and a mount namespace of
// its own. It needs what every rootless runtime does: a range of further user
// and group ids in /etc/subuid and /etc/subgid, and the set-user-ID programs
// newuidmap and newgidmap that map them. The process stays the same one, with
// its id and its parent; there is none beside it.
//
//	user's process       makes a child in new namespaces, has its ids mapped,
//	                     opens the namespaces, ends the child; or opens those of
//	                     a process that an earlier run has left
//	execve of nsenter    enters them: only a process with one thread can, which
//	                     no Go program has
//	execve of itself     root
//
// A program that is root of a user namespace already, for example under
// rootlesskit, uses that one.
//
// Here says which ids there are, OwnsNetwork whether the network can be changed.
package rootless
