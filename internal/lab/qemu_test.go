// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// aNode is a node of a network of its own, gone with the test.
func aNode(t *testing.T) *Node {
	t.Helper()
	run, err := NewRunDir()
	if err != nil {
		t.Fatal(err)
	}
	network, err := NewNetwork(run, testSpec().nodes(), testSpec().Queue)
	if err != nil {
		t.Fatal(errors.Join(err, run.Close()))
	}
	t.Cleanup(func() {
		if err := errors.Join(network.Close(), run.Close()); err != nil {
			t.Error(err)
		}
	})
	return network.Nodes[0]
}

func TestQEMUHoldsMemoryWhereAsked(t *testing.T) {
	node, assets := aNode(t), testAssets(t)
	type backend struct {
		Size  int64 `json:"size"`
		Share bool  `json:"share"`
	}
	for _, tc := range []struct {
		memory Memory
		want   []backend
	}{
		{MemoryPrivate, []backend{{192 << 20, false}}},
		{MemoryShared, []backend{{192 << 20, true}}},
	} {
		q, err := StartQEMU(t.Context(), node, QEMUConfig{
			Name: "memory-" + string(tc.memory), Assets: assets, MemoryMiB: 192, Memory: tc.memory,
			Guest: testSpec().guestConfig(0), Extra: []string{"-S"},
		})
		if err != nil {
			t.Fatal(err)
		}
		var got []backend
		if err := q.QMP.Execute(t.Context(), "query-memdev", nil, &got); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%q: %s", tc.memory, diff)
		}
		q.Close()
		<-q.Done()
		if err := syscall.Kill(q.Pid(), 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("QEMU %d is still there: %v", q.Pid(), err)
		}
	}
}

func TestUnknownOrMissingMemoryIsNamed(t *testing.T) {
	for memory, says := range map[Memory]string{"swap": `memory "swap"`, MemoryHuge: "vm.nr_hugepages"} {
		_, err := StartQEMU(t.Context(), &Node{}, QEMUConfig{Name: "q", Memory: memory, MemoryMiB: 1 << 30})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error %v does not say %q", memory, err, says)
		}
	}
}

func TestQEMUThatCannotStartSaysWhy(t *testing.T) {
	node, assets := aNode(t), testAssets(t)
	_, err := StartQEMU(t.Context(), node, QEMUConfig{
		Name: "broken", Assets: assets, MemoryMiB: 192, Guest: testSpec().guestConfig(0), Extra: []string{"-device", "no-such-device"},
	})
	if !errors.Is(err, ErrEnded) || !strings.Contains(err.Error(), "no-such-device") {
		t.Errorf("error %v", err)
	}
}
