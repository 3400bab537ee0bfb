package ops

import (
	"strings"
	"testing"
	"time"
)

func TestLimitsOfOptions(t *testing.T) {
	byDefault := Limits{Step: time.Hour, Quiet: time.Minute}
	for _, tc := range []struct {
		opts map[string]string
		want Limits
		err  string
	}{
		{nil, byDefault, ""},
		{map[string]string{"target": "x", "build-arg:X": "1"}, byDefault, ""},
		{map[string]string{"kiln.step-timeout": "10m"}, Limits{Step: 10 * time.Minute, Quiet: time.Minute}, ""},
		{map[string]string{"kiln.step-timeout": "0", "kiln.build-timeout": "3h"}, Limits{Quiet: time.Minute, Build: 3 * time.Hour}, ""},
		{map[string]string{"build-arg:KILN_NO_OUTPUT_TIMEOUT": "1m30s"}, Limits{Step: time.Hour, Quiet: 90 * time.Second}, ""},
		{map[string]string{"build-arg:KILN_STEP_TIMEOUT": "1m", "kiln.step-timeout": "2m"}, Limits{Step: 2 * time.Minute, Quiet: time.Minute}, ""},
		{map[string]string{"kiln.step-timeout": "ten"}, Limits{}, `option kiln.step-timeout is "ten"`},
		{map[string]string{"build-arg:KILN_STEP_TIMEOUT": "-1m"}, Limits{}, `option KILN_STEP_TIMEOUT is "-1m"`},
	} {
		got, err := byDefault.With(tc.opts)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%v: error %v", tc.opts, err)
			}
			continue
		}
		if err != nil || got != tc.want {
			t.Errorf("%v: %+v, %v, want %+v", tc.opts, got, err, tc.want)
		}
	}
}
