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
	return none{newPool(poolConfig{
		make:  func(context.Context) (*Namespace, error) { return create(func(*Namespace) error { return nil }) },
		ahead: noneAhead, keep: remembered, makers: makers(), log: log,
	})}
}

func (n none) Take(ctx context.Context, u User) (*Namespace, error) { return n.pool.Take(ctx, u.Asks) }

func (n none) Close() error { return n.pool.Close() }
