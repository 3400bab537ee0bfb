//go:build linux

package network

import (
	"context"
	"log/slog"
)

// noneAhead is how many namespaces with loopback only are made ahead: few
// steps ask for them, and they are quickly made.
const noneAhead = 3

// none provides loopback.
type none struct{ pool *pool }

func openNone(log *slog.Logger) none {
	return none{newPool(noneAhead, usedKept, log, func(context.Context) (*Namespace, error) {
		return create(func(*Namespace) error { return nil })
	})}
}

func (n none) Take(ctx context.Context, _ string) (*Namespace, error) { return n.pool.Take(ctx) }

func (n none) Close() error { return n.pool.Close() }
