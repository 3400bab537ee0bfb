package cleanup

import (
	"errors"
	"slices"
	"testing"
)

func TestRunReversesOnceAndJoinsErrors(t *testing.T) {
	var got []int
	boom := errors.New("boom")
	var s Stack
	s.AddFunc(func() { got = append(got, 1) })
	s.Add(func() error { got = append(got, 2); return boom })
	if err := s.Run(); !errors.Is(err, boom) {
		t.Fatalf("Run = %v, want boom", err)
	}
	if err := s.Run(); err != nil {
		t.Fatalf("second Run = %v, want nil", err)
	}
	if want := []int{2, 1}; !slices.Equal(got, want) {
		t.Fatalf("ran %v, want %v", got, want)
	}
}

func TestKeepHandsOver(t *testing.T) {
	ran := 0
	var s Stack
	s.AddFunc(func() { ran++ })
	release := s.Keep()
	if err := s.Run(); err != nil || ran != 0 {
		t.Fatalf("Run after Keep: err %v, ran %d", err, ran)
	}
	if err := release(); err != nil || ran != 1 {
		t.Fatalf("release: err %v, ran %d", err, ran)
	}
}
